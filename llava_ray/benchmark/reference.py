"""The baseline's log probabilities, computed once and read by every variant's measurement.

Half precision is enough: normalized again, a stored row is within about 1e-6 nats of the original.
"""

import logging
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_ray.artifacts.records import DatasetRecord, ReferenceScores, Variant
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.benchmark.fidelity import SampleFidelity
from llava_ray.benchmark.plan import Plan, held_out
from llava_ray.errors import DataError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.conversation import Sample, encode_with_images
from llava_ray.models.family import Family

logger = logging.getLogger(__name__)


def encode(
    tokenizer: object, sample: Sample, plan: Plan, family: Family
) -> tuple[Prompt, tuple[int, ...]]:
    """Return the prompt of a data set's sample, and the ids of its last answer.

    Raises DataError where no token of the answer fits into `max_length`.
    """
    encoded, images = encode_with_images(
        tokenizer,
        sample,
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
    """Score the held-out captions with the baseline and store what it says of each token."""
    settings, parents = plan.reference_settings(), (baseline.id, dataset.id)
    samples = held_out(dataset, plan.config.fidelity_samples)
    store, tokens = ArtifactStore(plan.run.storage.uri), 0
    name = plan.reference_id(baseline, dataset)
    with store.build(ReferenceScores, name, settings=settings, parents=parents) as build:
        if build.found:
            return build.found
        for index, sample in enumerate(samples):
            logger.info("%s: baseline scores sample %d of %d", name, index + 1, len(samples))
            prompt, caption = encode(engine.tokenizer, sample, plan, engine.family)
            log_probs = torch.log_softmax(engine.score(prompt, caption).float(), dim=-1)
            tensors = {"log_probs": log_probs.half(), "top1": log_probs.argmax(dim=-1)}
            save_file(tensors, build.folder / f"{index:06d}.safetensors")
            tokens += len(caption)
        return build.finish(
            ReferenceScores, device=device, num_samples=len(samples), num_tokens=tokens
        )


def read_reference(record: ReferenceScores) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield of each sample, in the order of the held-out split, what the baseline says of its last
    answer's tokens: float16 log probabilities [tokens, vocab], and the likeliest before rounding.
    """
    folder = local_folder(record)
    for name in sorted(record.files):
        tensors = load_file(folder / name)
        yield tensors["log_probs"], tensors["top1"]


def compare(reference: Tensor, top1: Tensor, logits: Tensor, caption: Tensor) -> SampleFidelity:
    """Sum up one sample.

    reference: the baseline's log probabilities, [tokens, vocab], in half precision; they are
    normalized again, so the divergence is that of two distributions and never below 0.
    top1: its likeliest tokens, from before the rounding. logits: the variant's, [tokens, vocab].
    caption: its tokens. top1 and caption are int64 [tokens].
    """
    expected = torch.log_softmax(reference.float(), dim=-1)
    found = torch.log_softmax(logits.float(), dim=-1)
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    likelihood = found.gather(-1, caption.unsqueeze(-1))
    return SampleFidelity(
        tokens=len(caption),
        kl_sum=float(divergence.double().sum()),
        nll_sum=float(-likelihood.double().sum()),
        top1_matches=int((logits.argmax(dim=-1) == top1).sum()),
    )
