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
from llava_ray.models.conversation import IGNORE_INDEX, Sample, encode_sample
from llava_ray.models.folder import VisionShape
from llava_ray.models.images import tower_input

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask and labels [batch, length], pixel_values [images, 3, size, size]."""

_WINDOW = 16
"""Global batches among which samples are sorted by length."""
_TURN_TOKENS = 64
"""At most what a chat template writes around a question and its answer."""


@dataclass(frozen=True)
class StreamOrder:
    """Which sample stands at a position of the endless stream."""

    lengths: tuple[int, ...]
    """Negative for samples of text alone."""
    seed: int
    group: int
    """Samples of one optimizer step."""
    by_length: bool
    """Samples of like length are kept together in such groups, those with images apart from
    others."""

    def at(self, position: int) -> int:
        """Return the index of the sample at a position."""
        epoch, offset = divmod(position, len(self.lengths))
        return _epoch_order(self, epoch)[offset]


@functools.lru_cache(maxsize=2)
def _epoch_order(order: StreamOrder, epoch: int) -> list[int]:
    """Shuffle, sort windows by length, and shuffle the groups that this makes.

    Source: LLaVA, llava/train/llava_trainer.py, get_modality_length_grouped_indices.
    """
    draw = random.Random(f"{order.seed}-{epoch}")
    indices = list(range(len(order.lengths)))
    draw.shuffle(indices)
    if not order.by_length:
        return indices
    window = _WINDOW * order.group
    groups, rest = [], []
    for text_alone in (False, True):
        kind = [i for i in indices if (order.lengths[i] < 0) == text_alone]
        for start in range(0, len(kind), window):
            part = kind[start : start + window]
            kind[start : start + window] = sorted(part, key=lambda i: order.lengths[i])
        full = len(kind) // order.group * order.group
        groups += [kind[i : i + order.group] for i in range(0, full, order.group)]
        rest += kind[full:]
    groups += [rest[i : i + order.group] for i in range(0, len(rest), order.group)]
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
        whole = ids.count(self.shape.image_token_id) // self.shape.tokens_per_image
        paths = [self.images / name for name in sample.images[:whole]]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": tower_input(paths, self.shape, self.max_image_pixels),
        }

    def check_room(self) -> list[str]:
        """Return the ids of the samples that max_length cuts.

        Raises ConfigError when it leaves nothing of a sample's first answer.
        """
        cut = []
        for sample in self.samples:
            images = len(sample.images) * self.shape.tokens_per_image
            letters = sum(len(f"{t.text}{t.answer}".encode()) + _TURN_TOKENS for t in sample.turns)
            # No token is less than a byte, so long samples alone are tokenized.
            if images + letters + len(sample.system or self.system) + 1 <= self.max_length:
                continue
            ids, labels = encode_sample(
                self.tokenizer,
                sample,
                tokens_per_image=self.shape.tokens_per_image,
                max_length=2**31,
                system=self.system,
            )
            if len(ids) > self.max_length:
                first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
                if first >= self.max_length:
                    raise ConfigError(
                        f"train.max_length={self.max_length} cuts the question "
                        f"{sample.turns[0].text[:40]!r} of sample {sample.id}: images and question "
                        f"alone need {first} tokens"
                    )
                cut.append(sample.id)
        return cut


def text_lengths(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Return the characters of each sample, which order samples as their tokens would.

    Negative for text alone, as in LLaVA's trainer.
    """
    return tuple(
        sum(len(turn.text) + len(turn.answer or "") for turn in sample.turns)
        * (1 if sample.images else -1)
        for sample in samples
    )


def collate(samples: Sequence[Batch], *, pad_token_id: int) -> Batch:
    """Pad to the longest sample at the right."""
    ids = [s["input_ids"] for s in samples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(
            [s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX
        ),
        "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
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
