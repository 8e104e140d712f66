"""Samples in the order of training, encoded and decoded lazily.

Surprising: the order is one endless stream that depends on the seed alone, so a run is resumed by
the number of samples already seen, also with another number of workers.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from llava_ray.errors import ConfigError
from llava_ray.models.chat_template import Turn, control_tokens
from llava_ray.models.conversation import (
    IGNORE_INDEX,
    Sample,
    encode_sample,
    encode_with_images,
)
from llava_ray.models.dataset import Numbers, Split
from llava_ray.models.family import Family
from llava_ray.models.images import read_pixels

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask and labels [batch, length], and what `Family.inputs` gives."""

_SPARE_TOKENS = 4
"""That a template may write more around one turn than around another."""
_WINDOW = 16
"""Global batches among which samples are sorted by length."""


@dataclass(frozen=True, eq=False)
class StreamOrder:
    """Which sample stands at a position of the endless stream; its hash reads no lengths."""

    lengths: tuple[int, ...]
    """The letters of each sample, which order them as their tokens would; negative for samples of
    text alone, as in LLaVA's trainer."""
    seed: int
    group: int
    """Samples of one optimizer step."""
    by_length: bool
    """Samples of like length are kept together in such groups, those with images apart from
    others."""

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch: whole groups, the last filled up with some of its samples."""
        count = len(self.lengths)
        return -(-count // self.group) * self.group if self.by_length else count

    def at(self, position: int) -> int:
        """Return the index of the sample at a position."""
        epoch, offset = divmod(position, self.epoch_length)
        return _epoch_order(self, epoch)[offset]


@functools.lru_cache(maxsize=2)
def _epoch_order(order: StreamOrder, epoch: int) -> list[int]:
    """Shuffle, sort windows by length, and shuffle the groups that this makes; the rest is last.

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
    draw.shuffle(groups)
    found = [index for group in groups for index in group] + rest
    return [*found, *itertools.islice(itertools.cycle(indices), order.epoch_length - len(found))]


def rank_batches(
    order: StreamOrder, start: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Give the micro-batches of one rank, as lists of sample indices, from a position on."""
    for position in itertools.count(start + rank * batch_size, batch_size * world_size):
        yield [order.at(position + i) for i in range(batch_size)]


@dataclass(frozen=True)
class CaptionSamples:
    """A map-style data set: encodes text and decodes the image when a sample is asked for."""

    split: Split
    tokenizer: Any
    family: Family
    max_length: int
    max_image_pixels: int
    system: str

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Batch:
        encoded, images = encode_with_images(
            self.tokenizer,
            self.split.read(index),
            self.family,
            max_length=self.max_length,
            max_pixels=self.max_image_pixels,
            system=self.system,
        )
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            **self.family.inputs(images),
        }

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """Pad to the longest sample at the right.

        A batch of text alone has a blank picture, of which nothing is taken: ranks with pictures
        and those without must gather the same weights and average the same gradients.
        """
        ids, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
        pad = pad_id(self.tokenizer)
        shown = samples if any(len(s["pixel_values"]) for s in samples) else [self._blank]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        } | {name: torch.cat([sample[name] for sample in shown]) for name in self._blank}

    @functools.cached_property
    def _blank(self) -> Batch:
        return self.family.inputs([self.family.pixels(Image.new("RGB", (1, 1)))])

    def check_room(self) -> list[str]:
        """Return the ids of the samples that max_length cuts.

        Raises ConfigError when it leaves nothing of a sample's first answer.
        """
        cut, split = [], self.split
        most = self.family.max_image_tokens
        varies = self.family.vision.tokens != most
        needed = split.num_images * most + self._most_text_tokens()
        # Long samples alone are read and tokenized.
        for index in np.flatnonzero(needed > self.max_length).tolist():
            sample = split.read(index) if varies else split.row(index)
            tokens = [most] * len(sample.images)
            if varies:
                images = read_pixels(sample.pictures, self.family, self.max_image_pixels)
                tokens = [image.num_tokens for image in images]
            encoded = encode_sample(
                self.tokenizer, sample, tokens, max_length=2**31, system=self.system
            )
            if len(encoded.labels) > self.max_length:
                first = next(i for i, id in enumerate(encoded.labels) if id != IGNORE_INDEX)
                if first >= self.max_length:
                    raise ConfigError(
                        f"train.max_length={self.max_length} cuts the question "
                        f"{sample.turns[0].text[:40]!r} of sample {sample.id}: images and question "
                        f"alone need {first} tokens"
                    )
                cut.append(sample.id)
        return cut

    def _most_text_tokens(self) -> Numbers:
        """Return at least what each row's text comes to: no token is less than a byte."""
        turn = Turn("?", 0, "!")
        once, twice = (
            len(
                encode_sample(
                    self.tokenizer, Sample("", (), turns), [], max_length=2**31, system=self.system
                ).labels
            )
            for turns in ((turn,), (turn, turn))
        )
        # Control tokens in a text become longer by a joiner.
        shortest = min(len(token) for token in control_tokens(self.tokenizer) if len(token) > 1)
        bytes_of_text = self.split.text_bytes * (1 + len("\u2060".encode()) / shortest)
        each = max(0, twice - once) + _SPARE_TOKENS
        found: Numbers = np.ceil(bytes_of_text).astype(np.int64) + once + each * self.split.turns
        return found


def train_batches(
    data: CaptionSamples, batches: Iterator[list[int]], *, loader_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Give a rank's micro-batches without end."""
    loader: DataLoader[Batch] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=loader_workers,
        collate_fn=data.collate,
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
        batch = data.collate([data[i] for i in indices or [0]])
        if not indices:
            batch["labels"].fill_(IGNORE_INDEX)
        yield batch


def pad_id(tokenizer: Any) -> int:
    """Return the padding token, or 0 for a tokenizer without; the attention mask hides it."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
