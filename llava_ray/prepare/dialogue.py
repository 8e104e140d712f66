"""Conversations as people write them: LLaVA's and ShareGPT's turns, OpenAI's messages.

Other spellings of the same, such as `role` for `from`, are read too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.models.chat_template import IMAGE_TOKEN, Turn

_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "bard": "assistant", "bing": "assistant", "claude": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_WHO = ("from", "role", "speaker")
_WHAT = ("value", "content", "text")
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image", "image_url", "input_image")
"""Kinds of parts of a message, in OpenAI's chats and in its responses."""


class RowProblem(Exception):
    """Why a row is left out; never leaves this stage."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose images are still cells of a source."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]
    system: str | None = None


class Place(int):
    """Which of the row's images a part shows, from 0."""


@dataclass
class _Message:
    role: str
    text: str
    images: list[Any]
    """Of its parts; None for the next of the row's column, a `Place` for one by its number."""


def read_dialogue(said: Any, images: Sequence[Any]) -> Dialogue:
    """Read a row's conversation.

    images: those of the row's own column, for places that name none. As LLaVA's trainer does,
    pictures come before the text of their turn. An assistant's greeting and a question without an
    answer are left out, since nothing is to be learned from them. Raises RowProblem.
    """
    messages = list(_messages(said))
    system = "\n".join(m.text for m in messages if m.role == "system") or None
    turns, shown, left = _turns([m for m in messages if m.role != "system"], list(images))
    if not turns:
        raise RowProblem("no_exchange", "no question that is answered")
    if left and not any(turn.num_images for turn in turns):
        # Nobody says where: before the first question.
        turns[0] = Turn(turns[0].text, len(left), turns[0].answer)
        shown, left = left, []
    if left:
        raise RowProblem(
            "image_count", f"{len(left)} more images than {IMAGE_TOKEN} in the conversation"
        )
    return Dialogue(tuple(turns), tuple(shown), system)


def _turns(
    messages: Sequence[_Message], images: list[Any]
) -> tuple[list[Turn], list[Any], list[Any]]:
    """Return answered turns, the images they show, and those of the row that none shows."""
    turns: list[Turn] = []
    shown: list[Any] = []
    left = dict(enumerate(images))
    pending: Turn | None = None
    for message in messages:
        if message.role == "user":
            own = []
            for image in message.images:
                if image is None or isinstance(image, Place):
                    number = next(iter(left), len(images)) if image is None else image
                    if not 0 <= number < len(images):
                        raise RowProblem("no_image", f"more {IMAGE_TOKEN} than images")
                    left.pop(number, None)
                    image = images[number]
                own.append(image)
            shown += own
            before = (pending.text, pending.num_images) if pending else ("", 0)
            text = "\n".join(filter(None, (before[0], message.text)))
            if not text and not before[1] and not own:
                raise RowProblem("no_exchange", "a question is empty")
            pending = Turn(text, before[1] + len(own))
        elif pending is not None:
            turns.append(Turn(pending.text, pending.num_images, _answer(message)))
            pending = None
        elif turns:
            last = turns[-1]
            joined = f"{last.answer}\n{_answer(message)}"
            turns[-1] = Turn(last.text, last.num_images, joined)
    if pending is not None and pending.num_images:
        # An unanswered question takes its pictures with it.
        shown = shown[: len(shown) - pending.num_images]
    return turns, shown, list(left.values())


def _answer(message: _Message) -> str:
    if not message.text:
        raise RowProblem("empty_caption", "an answer is empty")
    if message.images:
        raise RowProblem("image_token_in_caption", shorten(message.text))
    return message.text


def _messages(said: Any) -> Iterator[_Message]:
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError as error:
            raise RowProblem("no_exchange", f"text that is no JSON: {shorten(said)}") from error
    if not isinstance(said, list):
        raise RowProblem("no_exchange", f"a {type(said).__name__}, not a list of turns")
    for turn in said:
        if not isinstance(turn, dict):
            raise RowProblem("no_exchange", f"a turn is a {type(turn).__name__}, not an object")
        if isinstance(turn.get("user"), str) and isinstance(turn.get("assistant"), str):
            yield _message("user", turn["user"])
            yield _message("assistant", turn["assistant"])
            continue
        who = next((turn[key] for key in _WHO if turn.get(key)), None)
        role = _ROLES.get(who.strip().lower()) if isinstance(who, str) else None
        if role is None:
            raise RowProblem("no_exchange", f"a turn is by {who!r}: {', '.join(_ROLES)} are known")
        if role == "assistant" and turn.get("weight") == 0:
            raise RowProblem("no_exchange", "an answer of weight 0: all answers are learned")
        yield _message(role, next((turn[key] for key in _WHAT if turn.get(key) is not None), ""))


def _message(role: str, content: Any) -> _Message:
    if isinstance(content, str):
        text, images = content, [None] * content.count(IMAGE_TOKEN)
        return _Message(role, without_images(text), list(images))
    if not isinstance(content, list):
        raise RowProblem("no_exchange", f"a turn's text is a {type(content).__name__}")
    texts, found = [], []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS and isinstance(part.get("text"), str):
            found += [None] * part["text"].count(IMAGE_TOKEN)
            texts.append(without_images(part["text"]))
        elif kind in _PICTURES:
            found.append(_picture(part))
        else:
            raise RowProblem("no_exchange", f"a part of a turn is {shorten(str(part))}")
    return _Message(role, "\n".join(filter(None, texts)), found)


def _picture(part: dict[str, Any]) -> Any:
    """Return what a part shows, or None where it only marks the place."""
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("bytes") or value.get("path")
        if value:
            return value
    number = part.get("index")
    return Place(number) if isinstance(number, int) and not isinstance(number, bool) else None


def without_images(text: str) -> str:
    """Return a text without its image tokens, and without those that come of taking them out."""
    while IMAGE_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "")
    return text.strip()


def shorten(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= 120 else f"{text[:117]}..."
