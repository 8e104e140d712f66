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
    """One row of LLaVA JSON with a single exchange."""

    id: str
    image: str
    """Path relative to the data set's images/ folder."""
    question: str
    answer: str


def read_samples(path: Path) -> list[Sample]:
    """Read LLaVA JSON: id, image, conversations of one human and one gpt turn.

    Raises DataError when the file does not hold that.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [_sample(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not LLaVA JSON ({type(error).__name__}: {error})") from error


def _sample(row: dict[str, Any]) -> Sample:
    human, gpt = row["conversations"][:2]
    question = human["value"].replace(f"{IMAGE_TOKEN}\n", "", 1).replace(IMAGE_TOKEN, "", 1)
    return Sample(id=str(row["id"]), image=row["image"], question=question, answer=gpt["value"])


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

    Too long samples are cut at the end, as LLaVA's trainer does.
    """
    template = chat_template(tokenizer)
    turn = Turn(sample.question, num_images=1, answer=sample.answer)
    written = template.write([turn], system, tokens_per_image)
    encoded = tokenizer(
        written.text,
        add_special_tokens=template.adds_special_tokens,
        return_offsets_mapping=True,
    )
    ids = list(encoded["input_ids"])[:max_length]
    learned = inside(encoded["offset_mapping"], written.answers)
    return ids, [id if learn else IGNORE_INDEX for id, learn in zip(ids, learned, strict=False)]
