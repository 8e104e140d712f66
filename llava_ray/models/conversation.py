"""LLaVA's conversation format: samples on disk, prompts, token ids and labels.

A literal `<image>` in somebody's text is text: only the template places image tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import DataError

IMAGE_TOKEN = "<image>"
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


@dataclass(frozen=True)
class Turn:
    """One user message, and the answer to it unless it is the last."""

    text: str
    num_images: int = 0
    answer: str | None = None


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


def protect(text: str) -> str:
    """Keep a user's text from being read as special tokens, by a word joiner after `<`."""
    for special in (IMAGE_TOKEN, "<s>", "</s>", "<unk>", "<pad>"):
        text = text.replace(special, f"<\u2060{special[1:]}")
    return text


def prompt_text(turns: Sequence[Turn], *, system: str = "", image_tokens: int = 1) -> str:
    """Write turns in Vicuna's format, up to where the assistant is to go on.

    Source: the chat template of llava-hf/llava-1.5-7b-hf.
    """
    text = f"{system} " if system else ""
    for turn in turns:
        images = (IMAGE_TOKEN * image_tokens + "\n") * turn.num_images
        text += f"USER: {images}{protect(turn.text)} ASSISTANT:"
        if turn.answer is not None:
            text += f" {protect(turn.answer)}</s>"
    return text


def encode_prompt(
    tokenizer: Any, turns: Sequence[Turn], *, tokens_per_image: int, system: str = ""
) -> list[int]:
    """Return the prompt's ids, each image being a run of `tokens_per_image` image tokens."""
    text = prompt_text(turns, system=system, image_tokens=tokens_per_image)
    return list(tokenizer(text)["input_ids"])


def encode_sample(
    tokenizer: Any, sample: Sample, *, tokens_per_image: int, max_length: int, system: str = ""
) -> tuple[list[int], list[int]]:
    """Return ids and labels of one sample; only the answer and its </s> carry loss.

    Too long samples are cut at the end, as LLaVA's trainer does.
    """
    asked = Turn(sample.question, num_images=1)
    answered = Turn(sample.question, num_images=1, answer=sample.answer)
    prompt = encode_prompt(tokenizer, [asked], tokens_per_image=tokens_per_image, system=system)
    ids = encode_prompt(tokenizer, [answered], tokens_per_image=tokens_per_image, system=system)
    labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    return ids[:max_length], labels[:max_length]
