"""A served model, as the web layer sees it."""

import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.inference.engine import Prompt
from llava_ray.inference.process.messages import Opened
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk
from llava_ray.models.images import CLIP_MEAN, Colour
from llava_ray.server.metrics import Recorder


class ModelCard(BaseModel):
    """What clients and the web layer need to know of a served variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    slug: str
    digest: str
    """Over the SHA-256 of all of the variant's files."""
    created: int
    """Seconds since 1970."""
    image_size: int
    image_mean: Colour = CLIP_MEAN
    tokens_per_image: int
    eos_token_id: int
    context: int
    slots: int
    """Answers that are worked on at a time."""
    scorecard: dict[str, Any] | None = None


class Answering(Protocol):
    """What answers prompts: an `EngineProcess`."""

    def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; leaving the iteration stops the engine.

        Stop strings are the caller's to find. Raises ApiError.
        """

    def check(self) -> None:
        """Raise ApiError when no request can be answered."""


@dataclass(frozen=True)
class Backend:
    """A served model."""

    card: ModelCard
    tokenizer: Any
    """The Hugging Face tokenizer of the variant's folder."""
    engine: Answering
    recorder: Recorder

    @property
    def image_size(self) -> int:
        """Pixels on a side of what the model sees."""
        return self.card.image_size

    @property
    def image_mean(self) -> Colour:
        """The colour that pads an image to the square."""
        return self.card.image_mean

    @property
    def tokens_per_image(self) -> int:
        """Tokens that one image takes."""
        return self.card.tokens_per_image


def make_card(
    variant: Variant, opened: Opened, *, name: str, scorecard: Scorecard | None
) -> ModelCard:
    """Describe a loaded variant."""
    entries = sorted((path, entry.sha256) for path, entry in variant.files.items())
    digest = hashlib.sha256("".join(f"{sha} {path}\n" for path, sha in entries).encode())
    return ModelCard(
        name=name,
        slug=variant.slug,
        digest=f"sha256:{digest.hexdigest()}",
        created=int(datetime.fromisoformat(variant.created).timestamp()),
        **msgspec.structs.asdict(opened),
        scorecard=None if scorecard is None else _summary(scorecard),
    )


def _summary(scorecard: Scorecard) -> dict[str, Any]:
    return scorecard.model_dump(
        mode="json",
        include={
            "device", "variant_bytes", "memory_bytes", "prefill_s", "decode_tokens_per_s",
            "kl_divergence", "top1_agreement", "perplexity", "scores",
        },
    )  # fmt: skip
