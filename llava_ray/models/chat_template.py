"""How a model's conversations are written: by its tokenizer's chat template, or in Vicuna's format.

Vicuna's stands where the tokenizer has no template, and where the template writes the same words
without `</s>`, as that of llava-hf/llava-1.5-7b-hf does: LLaVA-1.5 was trained with it.

A literal `<image>` in somebody's text is text, and so is every other special token: only the
template places them.
"""

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llava_ray.errors import ConfigError

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
_LLAMA_TOKENS = ("<s>", "</s>", "<unk>", "<pad>")


@dataclass(frozen=True)
class Turn:
    """One user message, and the answer to it unless it is the last."""

    text: str
    num_images: int = 0
    answer: str | None = None


@dataclass(frozen=True)
class Written:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Where each answer stands, with the token that ends it: what carries loss."""


class ChatTemplate(Protocol):
    """Writes conversations; one of two kinds."""

    stop: str
    """The token that ends an answer."""
    adds_special_tokens: bool
    """Whether the tokenizer is to put its own, such as `<s>`, around the text."""

    def write(self, turns: Sequence[Turn], system: str, image_tokens: Sequence[int]) -> Written:
        """Write turns up to where the assistant is to go on, or to the end of the last answer.

        image_tokens: of each image, in the order in which turns show them.
        """


@functools.lru_cache(maxsize=16)
def chat_template(tokenizer: Any) -> ChatTemplate:
    """Return how the model of a tokenizer writes conversations.

    Raises ConfigError for a template that cannot be followed.
    """
    vicuna = Vicuna(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        logger.info("the tokenizer has no chat template: conversations are written as Vicuna's")
        return vicuna
    own = TokenizersOwn(tokenizer)
    probe = [Turn("What is it?", 1, "A sign."), Turn("And there?")]
    texts = [each.write(probe, "Be kind.", [1]).text for each in (vicuna, own)]
    same = len({"".join(text.replace(vicuna.stop, "").split()) for text in texts}) == 1
    return vicuna if same else own


def protect(text: str, tokenizer: Any) -> str:
    """Keep somebody's text from being read as special tokens, by a word joiner in each."""
    for special in _special_tokens(tokenizer):
        text = text.replace(special, f"{special[0]}\u2060{special[1:]}")
    return text


@functools.lru_cache(maxsize=16)
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special}
    found |= {IMAGE_TOKEN, *getattr(tokenizer, "all_special_tokens", _LLAMA_TOKENS)}
    # Of two that begin alike the longer one first.
    return tuple(
        sorted((each for each in found if len(each) > 1), key=lambda each: (-len(each), each))
    )


class Vicuna(ChatTemplate):
    """`SYSTEM USER: <image>\\n... ASSISTANT: ...</s>`.

    Source: LLaVA, llava/conversation.py, conv_vicuna_v1.
    """

    adds_special_tokens = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.stop = getattr(tokenizer, "eos_token", None) or "</s>"

    def write(self, turns: Sequence[Turn], system: str, image_tokens: Sequence[int]) -> Written:
        """Write turns up to where the assistant is to go on, or to the end of the last answer."""
        text = f"{protect(system, self._tokenizer)} " if system else ""
        answers, counts = [], iter(image_tokens)
        for turn in turns:
            images = _widen(f"{IMAGE_TOKEN}\n" * turn.num_images, counts)
            text += f"USER: {images}{protect(turn.text, self._tokenizer)} ASSISTANT:"
            if turn.answer is not None:
                start = len(text)
                text += f" {protect(turn.answer, self._tokenizer)}{self.stop}"
                answers.append((start, len(text)))
        return Written(text, tuple(answers))


class TokenizersOwn(ChatTemplate):
    """The tokenizer's chat template, which knows images as parts of a message or not at all."""

    adds_special_tokens = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._typed, self._has_system = self._read_styles()
        self.stop, self._ends = self._read_stop()

    def write(self, turns: Sequence[Turn], system: str, image_tokens: Sequence[int]) -> Written:
        """Write turns up to where the assistant is to go on, or to the end of the last answer."""
        if system and not self._has_system:
            first = Turn(f"{system}\n\n{turns[0].text}", turns[0].num_images, turns[0].answer)
            turns, system = [first, *turns[1:]], ""
        messages = [self._message("system", system)] if system else []
        asked = []
        for turn in turns:
            messages.append(self._message("user", turn.text, turn.num_images))
            if turn.answer is not None:
                asked.append(self._render(messages, go_on=True))
                messages.append(self._message("assistant", turn.answer))
        text = self._render(messages, go_on=turns[-1].answer is None)
        return self._place(text, asked, turns, image_tokens)

    def _place(
        self, text: str, asked: Sequence[str], turns: Sequence[Turn], image_tokens: Sequence[int]
    ) -> Written:
        """Find the answers, end each with the stop token and widen the image tokens."""
        written, done, answers, counts = "", 0, [], iter(image_tokens)
        for before, turn in zip(asked, turns, strict=False):
            answer = protect(turn.answer or "", self._tokenizer).strip()
            # A template may write an earlier answer otherwise than the last one.
            start = len(before) if text.startswith(before) else text.index(answer, done)
            end = text.index(answer, start) + len(answer)
            if self._ends:
                end = text.index(self.stop, end) + len(self.stop)
            written += _widen(text[done:start], counts)
            first = len(written)
            written += text[start:end] + ("" if self._ends else self.stop)
            answers.append((first, len(written)))
            done = end
        # Behind the last answer there is nothing to learn.
        if turns[-1].answer is None:
            written += _widen(text[done:], counts)
        return Written(written, tuple(answers))

    def _message(self, role: str, text: str, num_images: int = 0) -> dict[str, Any]:
        text = protect(text, self._tokenizer)
        if not self._typed:
            return {"role": role, "content": f"{IMAGE_TOKEN}\n" * num_images + text}
        parts: list[dict[str, str]] = [{"type": "image"}] * num_images
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def _render(self, messages: Sequence[dict[str, Any]], *, go_on: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=go_on
            )
        )

    def _read_styles(self) -> tuple[bool, bool]:
        """Return whether a message's content is a list of parts, and whether there is a system."""
        problem = ""
        for typed in (True, False):
            self._typed = typed
            question = self._message("user", "What is it?", 1)
            try:
                text = self._render([question], go_on=True)
            except Exception as error:  # What a stranger's template raises is its own.
                problem = f"{type(error).__name__}: {error}"
                continue
            if "What is it?" in text and "'type'" not in text and text.count(IMAGE_TOKEN) == 1:
                return typed, self._renders_system(question)
            problem = f"it writes {text[:80]!r}"
        raise ConfigError(
            "the tokenizer's chat template shows no question with an image "
            f"({' '.join(problem.split())}); mend chat_template.jinja, or delete it for Vicuna's"
        )

    def _renders_system(self, question: dict[str, Any]) -> bool:
        try:
            return "Be kind." in self._render([self._message("system", "Be kind."), question])
        except Exception:
            return False

    def _read_stop(self) -> tuple[str, bool]:
        """Return the token that ends an answer, and whether the template writes it itself."""
        messages = [self._message("user", "What is it?"), self._message("assistant", "A sign.")]
        _, _, tail = self._render(messages).rpartition("A sign.")
        places = {token: tail.find(token) for token in _special_tokens(self._tokenizer)}
        found = [token for token, place in places.items() if place >= 0]
        if found:
            return min(found, key=lambda token: places[token]), True
        if not self._tokenizer.eos_token:
            raise ConfigError(
                "neither the tokenizer's chat template nor its eos_token ends an answer: add "
                "eos_token to tokenizer_config.json"
            )
        return str(self._tokenizer.eos_token), False


def _widen(text: str, counts: Iterator[int]) -> str:
    return re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(counts), text)


def inside(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Say of each token, by its characters, whether it belongs to one of the spans."""
    return [any(start < last <= end for start, end in spans) for _, last in offsets]
