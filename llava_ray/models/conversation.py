"""Conversations of a data set, and conversations as token ids and labels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import DataError
from llava_ray.models.chat_template import IMAGE_TOKEN, Turn, chat_template, inside

IGNORE_INDEX = -100
"""Label of tokens that carry no loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True)
class Sample:
    """One conversation: what the model is trained on, calibrated with and measured by."""

    id: str
    images: tuple[str, ...]
    """Paths relative to the data set's images/ folder, in the order in which turns show them."""
    turns: tuple[Turn, ...]
    """All of them answered."""
    system: str | None = None
    """Default: the run's."""

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The conversation up to the last answer."""
        last = self.turns[-1]
        return (*self.turns[:-1], Turn(last.text, last.num_images))

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1].answer or ""

    def as_llava(self) -> dict[str, Any]:
        """Return the row as LLaVA's trainer reads it."""
        said: list[dict[str, str | None]] = []
        if self.system is not None:
            said.append({"from": "system", "value": self.system})
        for turn in self.turns:
            shown = f"{IMAGE_TOKEN}\n" * turn.num_images
            said.append({"from": "human", "value": shown + turn.text})
            said.append({"from": "gpt", "value": turn.answer})
        row: dict[str, Any] = {"id": self.id}
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        return row | {"conversations": said}

    @classmethod
    def from_llava(cls, row: dict[str, Any]) -> "Sample":
        """Read a row that `as_llava` wrote."""
        image, said = row.get("image", ()), row["conversations"]
        system = said[0]["value"] if said[0]["from"] == "system" else None
        turns = []
        for human, gpt in zip(*[iter(said[system is not None :])] * 2, strict=True):
            text = human["value"]
            shown = f"{IMAGE_TOKEN}\n"
            count = 0
            while text.startswith(shown):
                text, count = text.removeprefix(shown), count + 1
            turns.append(Turn(text, count, gpt["value"]))
        images = (image,) if isinstance(image, str) else tuple(image)
        return cls(str(row["id"]), images, tuple(turns), system)


def read_samples(path: Path) -> list[Sample]:
    """Read LLaVA JSON as the prepare stage writes it.

    Raises DataError when the file does not hold that.
    """
    try:
        return [Sample.from_llava(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not LLaVA JSON ({type(error).__name__}: {error})") from error


def encode_prompt(
    tokenizer: Any, turns: Sequence[Turn], *, tokens_per_image: int, system: str = ""
) -> list[int]:
    """Return the prompt's ids, each image being a run of `tokens_per_image` image tokens."""
    template = chat_template(tokenizer)
    text = template.write(turns, system, tokens_per_image).text
    options = {} if template.adds_special_tokens else {"add_special_tokens": False}
    return list(tokenizer(text, **options)["input_ids"])


def encode_sample(
    tokenizer: Any, sample: Sample, *, tokens_per_image: int, max_length: int, system: str = ""
) -> tuple[list[int], list[int]]:
    """Return ids and labels of one sample; only answers and the tokens that end them carry loss.

    system: where the sample has none of its own. Too long samples are cut at the end, as LLaVA's
    trainer does.
    """
    template = chat_template(tokenizer)
    system = system if sample.system is None else sample.system
    written = template.write(sample.turns, system, tokens_per_image)
    encoded = tokenizer(
        written.text,
        add_special_tokens=template.adds_special_tokens,
        return_offsets_mapping=True,
    )
    ids = list(encoded["input_ids"])[:max_length]
    # A cut inside of an image leaves none of it.
    if rest := ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) % tokens_per_image:
        ids = ids[:-rest]
    learned = inside(encoded["offset_mapping"], written.answers)
    return ids, [id if learn else IGNORE_INDEX for id, learn in zip(ids, learned, strict=False)]
