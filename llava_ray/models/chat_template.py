"""How a model's conversations are written: by its tokenizer's chat template, or in Vicuna's format.

Vicuna's stands where the tokenizer has no template, and where the template writes the same words
without `</s>`, as that of llava-hf/llava-1.5-7b-hf does: LLaVA-1.5 was trained with it.

A literal `<image>` in somebody's text is text, and so is every other special token: only the
template places them.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_ray.errors import ConfigError
from llava_ray.models.family import PROCESSORS

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
_LLAMA_TOKENS = ("<s>", "</s>", "<unk>", "<pad>")
_OVERLAPS = 2
"""Passes after which no token is left of those that lay over each other, as @@ in @@@."""
_BRACKETED = re.compile(r"<.*>|\[.*\]")
"""Tokens that are meant as marks, whether they are called special or not."""

VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Vicuna's format, as `Vicuna` writes it, for other readers of a model.

llama.cpp's tools pass a message's content as one string, of which the template of
llava-hf/llava-1.5-7b-hf would print nothing.
"""


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
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer's chat templates are {', '.join(tokenizer.chat_template)}: call the "
            "one to be used 'default'"
        )
    own = TokenizersOwn(tokenizer)
    probe = [Turn("What is it?", 1, "A sign."), Turn("And there?")]
    texts = [each.write(probe, "Be kind.", [1]).text for each in (vicuna, own)]
    same = len({"".join(text.replace(vicuna.stop, "").split()) for text in texts}) == 1
    return vicuna if same else own


def for_others(tokenizer: Any) -> str:
    """Return a template by which other programs write what `chat_template` does: typed contents are
    taken, and where there is none Vicuna's format is written."""
    own = tokenizer.chat_template
    if not own:
        return VICUNA_TEMPLATE
    text = own["default"] if isinstance(own, dict) else str(own)
    template = chat_template(tokenizer)
    plain = isinstance(template, TokenizersOwn) and not template.typed
    return PLAIN_CONTENTS + text if plain else text


PLAIN_CONTENTS = (
    "{%- set told = namespace(messages=[], text='') -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set told.messages = told.messages + [message] -%}"
    "{%- else -%}{%- set told.text = '' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set told.text = told.text + '<image>\n' -%}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set told.text = told.text + part['text'] -%}{%- endfor -%}"
    "{%- set told.messages = told.messages + "
    "[{'role': message['role'], 'content': told.text}] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = told.messages -%}"
)
"""Before a template that knows text alone: parts become the text that `TokenizersOwn` writes."""


def base_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a base model, with its processor's template where it has none."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = processors_template(folder)
    return tokenizer


def processors_template(folder: Path) -> str | None:
    """Return the chat template that stands beside a tokenizer, as llava-hf's folders have it."""
    for name in ("chat_template.json", PROCESSORS[1]):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_bytes()).get("chat_template")
            if isinstance(template, str) and template:
                return template
    return None


def protect(text: str, tokenizer: Any) -> str:
    """Keep somebody's text from being read as control tokens, by a word joiner in each."""
    guard = _guard(tokenizer)
    if guard.normalize is not None and any(
        token in guard.normalize(text) for token in guard.tokens
    ):
        text = guard.normalize(text)
    for token in guard.tokens:
        parted = f"{token[0]}{guard.joiner}{token[1:]}" if token[1:] else " "
        for _ in range(_OVERLAPS):
            text = text.replace(token, parted)
    return text


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that nobody's text may be read as."""
    return _guard(tokenizer).tokens


@dataclass(frozen=True)
class _Guard:
    tokens: tuple[str, ...]
    """Of two that begin alike the longer one first."""
    joiner: str
    """What stands in them where they are text."""
    normalize: Callable[[str], str] | None
    """What the tokenizer does with text before it looks for tokens."""


@functools.lru_cache(maxsize=16)
def _guard(tokenizer: Any) -> _Guard:
    added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    template = str(getattr(tokenizer, "chat_template", None) or "")
    found = {
        token.content
        for token in added
        if token.special
        or (token.content.strip() and token.content in template)
        or _BRACKETED.fullmatch(token.content)
    }
    found |= {IMAGE_TOKEN, *getattr(tokenizer, "all_special_tokens", _LLAMA_TOKENS)}
    tokens = tuple(sorted(filter(None, found), key=lambda each: (-len(each), each)))
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None or not any(token.normalized for token in added):
        return _Guard(tokens, "\u2060", None)
    normalize: Callable[[str], str] = normalizer.normalize_str
    # One that the normalizer leaves where it is.
    joiner = next(each for each in ("\u2060", "-", " ") if each in normalize(f"a{each}b"))
    return _Guard(tokens, joiner, normalize)


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
        self.typed, self._has_system = self._read_styles()
        self.stop, self._ends = self._read_stop()

    def write(self, turns: Sequence[Turn], system: str, image_tokens: Sequence[int]) -> Written:
        """Write turns up to where the assistant is to go on, or to the end of the last answer."""
        if system and not self._has_system:
            first = Turn(f"{system}\n\n{turns[0].text}", turns[0].num_images, turns[0].answer)
            turns, system = [first, *turns[1:]], ""
        mark = _unused_mark([system, *(turn.text for turn in turns)])
        messages = [self._message("system", system)] if system else []
        asked = []
        for index, turn in enumerate(turns):
            messages.append(self._message("user", turn.text, turn.num_images))
            if turn.answer is not None:
                asked.append(self._render(messages, go_on=True))
                messages.append(self._message("assistant", f"{mark}{index}{mark}"))
        text = self._render(messages, go_on=turns[-1].answer is None)
        return self._place(text, asked, turns, mark, image_tokens)

    def _place(
        self, text: str, asked: Sequence[str], turns: Sequence[Turn], mark: str,
        image_tokens: Sequence[int],
    ) -> Written:  # fmt: skip
        """Put the answers in place of their marks, each ended by the stop token, and widen the
        image tokens; what a template does to an answer's own text is not learned."""
        if asked and turns[-1].answer is not None and not text.startswith(asked[-1]):
            # The last prompt is written as it will be asked, with what a template puts there alone.
            text = asked[-1] + text[text.rfind(f"{mark}{len(turns) - 1}{mark}") :]
        shown, wanted = text.count(IMAGE_TOKEN), sum(turn.num_images for turn in turns)
        if shown != wanted:
            raise ConfigError(
                f"the tokenizer's chat template writes {shown} {IMAGE_TOKEN} for {wanted} "
                "pictures: mend chat_template.jinja, or delete it for Vicuna's"
            )
        written, done, answers, counts = "", 0, [], iter(image_tokens)
        for index, (before, turn) in enumerate(zip(asked, turns, strict=False)):
            place = text.find(f"{mark}{index}{mark}", done)
            if place < 0:
                raise ConfigError("the tokenizer's chat template leaves out an answer: mend it")
            # A template may write an earlier answer otherwise than the last one.
            start = len(before) if text.startswith(before) else place
            end = place + len(f"{mark}{index}{mark}")
            ending = self.stop
            if self._ends:
                stop = text.index(self.stop, end) + len(self.stop)
                ending, end = text[end:stop], stop
            written += _widen(text[done:start], counts)
            first = len(written)
            answer = protect(turn.answer or "", self._tokenizer).strip()
            written += text[start:place] + answer + ending
            answers.append((first, len(written)))
            done = end
        # Behind the last answer there is nothing to learn.
        if turns[-1].answer is None:
            written += _widen(text[done:], counts)
        return Written(written, tuple(answers))

    def _message(self, role: str, text: str, num_images: int = 0) -> dict[str, Any]:
        text = protect(text, self._tokenizer)
        if not self.typed:
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
            self.typed = typed
            question = self._message("user", "What is it?", 2)
            messages = [question, self._message("assistant", "Signs."), question]
            try:
                text = self._render([question], go_on=True)
                count = self._render(messages, go_on=True).count(IMAGE_TOKEN)
            except Exception as error:  # What a stranger's template raises is its own.
                problem = f"{type(error).__name__}: {error}"
                continue
            if "What is it?" in text and "'type'" not in text and count == 4:
                return typed, self._renders_system(question)
            problem = f"it writes {text[:80]!r}, with {count} {IMAGE_TOKEN} for 4 pictures"
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
        places = {token: tail.find(token) for token in _guard(self._tokenizer).tokens}
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
    return re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(counts, 1), text)


def _unused_mark(texts: Sequence[str]) -> str:
    mark = "\ue000"
    while any(mark in text for text in texts):
        mark += "\ue000"
    return mark


def inside(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Say of each token, by its characters, whether it belongs to one of the spans."""
    return [any(start < last <= end for start, end in spans) for _, last in offsets]
