"""OpenAI's response objects, from the tokens of one or more choices."""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_ray.inference.detokenize import Detokenizer, StopText
from llava_ray.inference.generate import FinishReason
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Chunk
from llava_ray.server.backend import Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Delta:
    """What one chunk adds to a choice."""

    text: str
    logprobs: list[dict[str, Any]]
    finish_reason: FinishReason | None


class Choice:
    """One answer as it grows: text without stop strings, log probabilities, token count."""

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopText(sampling.stop)
        self._wants_logprobs = sampling.top_logprobs is not None

    def add(self, chunk: Chunk) -> Delta:
        """Take a chunk; `finish_reason` is set once the choice is complete."""
        text, logprobs = "", []
        for step in chunk.steps:
            piece = self._detokenizer.push(step.token_id)
            if self._wants_logprobs:
                # Some tokenizers put a space before all text, which is not the answer's.
                lead = b"" if self.token_ids or piece.startswith(" ") else b" "
                logprobs.append(self._logprob(step, lead))
            self.token_ids.append(step.token_id)
            text += self._stop.push(piece)
            if self._stop.stopped:
                break
        if chunk.finish_reason is not None and not self._stop.stopped:
            text += self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        self.finish_reason = "stop" if self.was_cut else chunk.finish_reason
        self.text += text
        self.logprobs += logprobs
        return Delta(text, logprobs, self.finish_reason)

    @property
    def was_cut(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._stop.stopped

    def _logprob(self, step: Step, lead: bytes) -> dict[str, Any]:
        assert step.logprob is not None
        entry = self._entry(step.token_id, step.logprob, lead)
        rivals = [self._entry(token, value, lead) for token, value in step.top_logprobs]
        return entry | {"top_logprobs": rivals}

    def _entry(self, token_id: int, logprob: float, lead: bytes) -> dict[str, Any]:
        data = token_bytes(self._tokenizer, token_id).removeprefix(lead)
        # OpenAI's floor for what is all but impossible; JSON has no infinity.
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes that a token of a Llama tokenizer stands for."""
    piece = str(tokenizer.convert_ids_to_tokens(token_id))
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


@dataclass
class Reply:
    """The frame around the choices of one request."""

    model: Backend
    prompt_tokens: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return a chat.completion."""
        return self._object("chat.completion") | {
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": _logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": self.usage(choices),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that names the role."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, [], None)

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks that carry a delta; the finish reason comes in one of its own."""
        chunks = []
        if delta.text or delta.logprobs:
            chunks.append(self._chunk(index, {"content": delta.text}, delta.logprobs, None))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(index, {}, [], delta.finish_reason))
        return chunks

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the last chunk, which has the usage and no choices."""
        return self._object("chat.completion.chunk") | {"choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the token counts."""
        generated = sum(len(choice.token_ids) for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]],
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        chunk = self._object("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.digest.removeprefix("sha256:")[:12],
        }


def _logprobs(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": entries, "refusal": None} if entries else None


def model_object(model: Backend, *, deployment_id: str) -> dict[str, Any]:
    """Return what /v1/models says of a model."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llava_ray",
        "variant": model.slug,
        "digest": model.digest,
        "context": model.context,
        "deployment": deployment_id,
        "scorecard": model.scorecard,
    }
