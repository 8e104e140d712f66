"""The baseline's log probabilities, computed once and read by every variant's measurement.

Half precision is enough: normalized again, a stored row is within about 1e-6 nats of the original.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import DatasetRecord, ReferenceScores, Variant
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.benchmark.plan import Plan, held_out
from llava_ray.errors import DataError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.conversation import Sample, encode_with_images
from llava_ray.models.family import Family
from llava_ray.models.images import ImagePixels, stack_tiles

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ReferenceSample:
    """One sample's prompt, its caption's tokens and the baseline's view of them."""

    prompt: Prompt
    continuation: tuple[int, ...]
    """Ends with the end-of-sequence token unless the sample was cut."""
    log_probs: "torch.Tensor"
    """float16 [len(continuation), vocab]."""
    top1: "torch.Tensor"
    """The likeliest tokens before rounding, int64 [len(continuation)]."""


def reference_id(plan: Plan, baseline: Variant, dataset: DatasetRecord) -> str:
    """Return the artifact's id."""
    parents = (baseline.id, dataset.id)
    return artifact_id(ReferenceScores.kind, plan.reference_settings(), parents)


def encode(
    tokenizer: object, sample: Sample, plan: Plan, folder: Path, family: Family
) -> tuple[Prompt, tuple[int, ...]]:
    """Return the prompt of a data set's sample, and the ids of its last answer.

    Raises DataError where no token of the answer fits into `max_length`.
    """
    encoded, images = encode_with_images(
        tokenizer,
        sample,
        folder,
        family,
        max_length=plan.run.train.max_length,
        max_pixels=plan.run.data.max_image_pixels,
        system=plan.run.model.system_prompt,
    )
    ids = encoded.input_ids
    # Of several answers the last.
    start = max((i + 1 for i, label in enumerate(encoded.labels) if label < 0), default=0)
    if start == len(ids):
        raise DataError(
            f"sample {sample.id}: its prompt fills train.max_length={plan.run.train.max_length} "
            "tokens"
        )
    return Prompt(tuple(ids[:start]), tuple(images)), tuple(ids[start:])


def write_reference(
    engine: Engine, plan: Plan, baseline: Variant, dataset: DatasetRecord, device: str
) -> ReferenceScores:
    """Score the held-out captions with the baseline and store everything a variant needs."""
    settings, parents = plan.reference_settings(), (baseline.id, dataset.id)
    source = local_folder(dataset)
    samples = held_out(source, plan.config.fidelity_samples)
    store, tokens = ArtifactStore(plan.run.storage.uri), 0
    name = reference_id(plan, baseline, dataset)
    with store.build(ReferenceScores, name, settings=settings, parents=parents) as build:
        if build.found:
            return build.found
        for index, sample in enumerate(samples):
            logger.info("%s: baseline scores sample %d of %d", name, index + 1, len(samples))
            tokens += _write_sample(
                engine, sample, plan, source, build.folder / f"{index:06d}.safetensors"
            )
        return build.finish(
            ReferenceScores, device=device, num_samples=len(samples), num_tokens=tokens
        )


def _write_sample(engine: Engine, sample: Sample, plan: Plan, folder: Path, path: Path) -> int:
    import torch
    from safetensors.torch import save_file

    prompt, continuation = encode(engine.tokenizer, sample, plan, folder, engine.family)
    log_probs = torch.log_softmax(engine.score(prompt, continuation).float(), dim=-1)
    size = engine.family.vision.image_size
    shapes = [[len(i.tiles), i.num_tokens, *i.size] for i in prompt.images]
    save_file(
        {
            "log_probs": log_probs.half(),
            "top1": log_probs.argmax(dim=-1),
            "prompt_ids": torch.tensor(prompt.input_ids),
            "continuation": torch.tensor(continuation),
            "tiles": torch.from_numpy(stack_tiles(prompt.images, size)),
            "images": torch.tensor(shapes, dtype=torch.int64).reshape(-1, 4),
        },
        path,
    )
    return len(continuation)


def read_reference(record: ReferenceScores) -> Iterator[ReferenceSample]:
    """Yield the samples one by one, in the order of the held-out split."""
    from safetensors.torch import load_file

    folder = local_folder(record)
    for name in sorted(record.files):
        tensors = load_file(folder / name)
        shapes = tensors["images"].tolist()
        tiles = iter(tensors["tiles"].numpy())
        images = [
            ImagePixels(np.stack([*islice(tiles, count)]), tokens, (height, width))
            for count, tokens, height, width in shapes
        ]
        yield ReferenceSample(
            prompt=Prompt(tuple(tensors["prompt_ids"].tolist()), tuple(images)),
            continuation=tuple(tensors["continuation"].tolist()),
            log_probs=tensors["log_probs"],
            top1=tensors["top1"],
        )
