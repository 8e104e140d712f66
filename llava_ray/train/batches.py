"""Samples in the order of training, encoded and decoded lazily.

Surprising: the order is one endless stream that depends on the seed alone, so a run is resumed by
the number of samples already seen, also with another number of workers.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from llava_ray.errors import ConfigError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import IGNORE_INDEX, Sample, encode_prompt, encode_sample
from llava_ray.models.folder import VisionShape
from llava_ray.models.images import normalize, square_pixels
from llava_ray.models.rgb import open_image

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask and labels [batch, length], pixel_values [batch, 3, size, size]."""

_WINDOW = 16
"""Global batches among which samples are sorted by length."""


@dataclass(frozen=True)
class StreamOrder:
    """Which sample stands at a position of the endless stream."""

    lengths: tuple[int, ...]
    seed: int
    group: int
    """Samples of one optimizer step; samples of like length are kept together in such groups."""
    by_length: bool

    def at(self, position: int) -> int:
        """Return the index of the sample at a position."""
        epoch, offset = divmod(position, len(self.lengths))
        return _epoch_order(self, epoch)[offset]


@functools.lru_cache(maxsize=2)
def _epoch_order(order: StreamOrder, epoch: int) -> list[int]:
    """Shuffle, sort windows by length, and shuffle the groups that this makes.

    Source: LLaVA, llava/train/llava_trainer.py, get_length_grouped_indices.
    """
    draw = random.Random(f"{order.seed}-{epoch}")
    indices = list(range(len(order.lengths)))
    draw.shuffle(indices)
    if not order.by_length:
        return indices
    window = _WINDOW * order.group
    for start in range(0, len(indices), window):
        part = indices[start : start + window]
        indices[start : start + window] = sorted(part, key=lambda i: order.lengths[i])
    groups = [indices[i : i + order.group] for i in range(0, len(indices), order.group)]
    draw.shuffle(groups)
    return [index for group in groups for index in group]


def rank_batches(
    order: StreamOrder, start: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Give the micro-batches of one rank, as lists of sample indices, from a position on."""
    for position in itertools.count(start + rank * batch_size, batch_size * world_size):
        yield [order.at(position + i) for i in range(batch_size)]


@dataclass(frozen=True)
class CaptionSamples:
    """A map-style data set: encodes text and decodes the image when a sample is asked for."""

    samples: Sequence[Sample]
    images: Path
    tokenizer: Any
    shape: VisionShape
    max_length: int
    max_image_pixels: int
    system: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        sample = self.samples[index]
        ids, labels = encode_sample(
            self.tokenizer,
            sample,
            tokens_per_image=self.shape.tokens_per_image,
            max_length=self.max_length,
            system=self.system,
        )
        image = open_image(self.images / sample.image, max_pixels=self.max_image_pixels)
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": normalize(square_pixels(image, self.shape.image_size)),
        }

    def check_room(self) -> None:
        """Raise ConfigError when max_length would cut a question and its image."""
        room = self.max_length - self.shape.tokens_per_image
        # A question of few bytes cannot fill the room, so long ones alone are tokenized.
        questions = {s.question for s in self.samples if len(s.question.encode()) + 32 > room}
        for question in sorted(questions):
            needed = 1 + len(
                encode_prompt(
                    self.tokenizer,
                    [Turn(question, num_images=1)],
                    tokens_per_image=self.shape.tokens_per_image,
                    system=self.system,
                )
            )
            if needed > self.max_length:
                raise ConfigError(
                    f"train.max_length={self.max_length} cuts the question {question[:40]!r}: "
                    f"image and question alone need {needed} tokens"
                )


def text_lengths(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Return the characters of each sample, which order samples as their tokens would."""
    return tuple(len(s.question) + len(s.answer) for s in samples)


def collate(samples: Sequence[Batch], *, pad_token_id: int) -> Batch:
    """Pad to the longest sample at the right."""
    ids = [s["input_ids"] for s in samples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(
            [s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX
        ),
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
    }


def train_batches(
    data: CaptionSamples, batches: Iterator[list[int]], *, loader_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Give a rank's micro-batches without end."""
    loader: DataLoader[Batch] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=loader_workers,
        collate_fn=functools.partial(collate, pad_token_id=pad_id(data.tokenizer)),
        pin_memory=pin_memory,
        # Forking a Ray worker copies its threads' locks, which can hang the child.
        multiprocessing_context="forkserver" if loader_workers else None,
    )
    return iter(loader)


def eval_batches(
    data: CaptionSamples, *, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Give a rank's share of all samples, the same number of batches on every rank.

    Batches that only fill up carry no labels: ZeRO-3 gathers weights in step on all ranks.
    """
    stride = batch_size * world_size
    for start in range(0, len(data), stride):
        first = start + rank * batch_size
        indices = range(first, min(first + batch_size, len(data)))
        batch = collate([data[i] for i in indices or [0]], pad_token_id=pad_id(data.tokenizer))
        if not indices:
            batch["labels"].fill_(IGNORE_INDEX)
        yield batch


def pad_id(tokenizer: Any) -> int:
    """Return the padding token, or 0 for a tokenizer without; the attention mask hides it."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
