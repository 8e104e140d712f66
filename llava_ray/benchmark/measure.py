"""The work inside a worker process: open one variant and measure it."""

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from llava_ray.artifacts.identity import artifact_id, versions
from llava_ray.artifacts.records import (
    DatasetRecord,
    Generation,
    ReferenceScores,
    Scorecard,
    Spread,
    Variant,
)
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.benchmark.caption_scores import caption_scores
from llava_ray.benchmark.fidelity import FIDELITY_FILE, SampleFidelity, summarize
from llava_ray.benchmark.plan import Plan, held_out, is_model
from llava_ray.benchmark.reference import compare, encode, read_reference, write_reference
from llava_ray.benchmark.timing import PeakMemory, copy_bytes_per_s, spread, time_generation
from llava_ray.benchmark.turns import quiet_turn, shared_turn
from llava_ray.errors import VariantError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.generate import generate_text
from llava_ray.inference.llama_cpp.trial import features
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.sampling import SamplingParams
from llava_ray.models.conversation import Sample
from llava_ray.models.family import family_of
from llava_ray.models.rgb import open_image
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.devices import device_name

logger = logging.getLogger(__name__)


def scorecard_prefix(plan: Plan, variant: Variant, *others: str) -> str:
    """Return how the ids of a variant's scorecards begin; the device's name makes the rest.

    others: the ids of the data set and of the reference.
    """
    parents = (variant.id, *others)
    return artifact_id(Scorecard.kind, scorecard_settings(plan, variant), parents)


def scorecard_settings(plan: Plan, variant: Variant) -> dict[str, Any]:
    """Return what shapes a scorecard beside its parents."""
    libraries = versions("torch", "transformers", *spec_for(variant.slug).packages)
    return {**plan.settings(), "versions": libraries}


def score_baseline(plan: Plan, baseline: Variant, dataset: DatasetRecord) -> ReferenceScores:
    """Store the baseline's log probabilities of the held-out captions."""
    _set_threads(plan)
    folder = local_folder(baseline)
    with closing(_open(plan, baseline, folder, _context(plan, folder, dataset))) as engine:
        return write_reference(engine, plan, baseline, dataset, _device(plan.device))


def measure(
    plan: Plan,
    variant: Variant,
    baseline: Variant,
    dataset: DatasetRecord,
    reference: ReferenceScores,
) -> Scorecard:
    """Measure one variant in this process, whose memory should be that of the engine alone.

    Raises VariantError on another device than is wanted.
    """
    _set_threads(plan)
    model = device_name(plan.device)
    if not is_model(model, plan.model):
        raise VariantError(f"this node has {model}, and benchmark.device is {plan.model!r}")
    prefix = scorecard_prefix(plan, variant, dataset.id, reference.id)
    with ArtifactStore(plan.run.storage.uri).build(
        Scorecard,
        f"{prefix}-{hashlib.sha256(model.encode()).hexdigest()[:6]}",
        settings={**scorecard_settings(plan, variant), "device_name": model},
        parents=(variant.id, dataset.id, reference.id),
    ) as build:
        if build.found:
            return build.found
        with shared_turn():
            context = _context(plan, local_folder(baseline), dataset)
        fields, samples = _open_and_measure(plan, variant, dataset, reference, context)
        rows = [sample.model_dump() for sample in samples]
        spec = spec_for(variant.slug)
        names = ("torch", "transformers", *spec.packages)
        runs_on = {name: importlib.metadata.version(name) for name in names}
        if spec.method == "gguf":
            runs_on["llama.cpp uses"] = features()
        (build.folder / FIDELITY_FILE).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return build.finish(
            Scorecard,
            slug=variant.slug,
            variant_uri=variant.uri,
            dataset_uri=dataset.uri,
            versions=runs_on,
            variant_bytes=variant.size_bytes,
            **fields,
        )


def measure_captions(plan: Plan, variant: Variant, dataset: DatasetRecord) -> dict[str, float]:
    """Generate for the held-out samples in this process and score the captions."""
    _set_threads(plan)
    variant_folder = local_folder(variant)
    context = _context(plan, variant_folder, dataset)
    with closing(_open(plan, variant, variant_folder, context)) as engine:
        captioned = held_out(dataset, plan.config.caption_samples)
        generations = _generate(engine, plan, captioned)
    return caption_scores([g.reference for g in generations], [g.text for g in generations])


def _open_and_measure(
    plan: Plan,
    variant: Variant,
    dataset: DatasetRecord,
    reference: ReferenceScores,
    context: int,
) -> tuple[dict[str, Any], list[SampleFidelity]]:
    folder = local_folder(variant)
    memory = PeakMemory(plan.device)
    with shared_turn():
        start = time.perf_counter()
        engine = _open(plan, variant, folder, context)
        load_s = time.perf_counter() - start
    logger.info("%s: opened in %.1f s", variant.slug, load_s)
    with closing(engine):
        fields, samples = measure_engine(engine, plan, dataset, reference)
        fields |= {
            "load_s": load_s,
            # Before anything else allocates: the bandwidth test's buffers are not the engine's.
            "memory_bytes": memory.read(),
            "weight_bytes": engine.weight_bytes(),
        }
        device = engine.computes_on
    with quiet_turn():
        fields |= {"device": _device(device), "copy_bytes_per_s": copy_bytes_per_s(device)}
    return fields, samples


def measure_engine(
    engine: Engine, plan: Plan, dataset: DatasetRecord, reference: ReferenceScores
) -> tuple[dict[str, Any], list[SampleFidelity]]:
    """Return a scorecard's fields of speed, fidelity and captions, and fidelity by sample."""
    captioned = held_out(dataset, plan.config.caption_samples)
    with quiet_turn():
        prompt = _prompt(engine, plan, captioned[0])
        prefill_s, decode_rate = time_engine(engine, plan, prompt)
    samples = score_fidelity(engine, plan, dataset, reference)
    generations = _generate(engine, plan, captioned)
    references, texts = [g.reference for g in generations], [g.text for g in generations]
    with shared_turn():
        scores = caption_scores(references, texts)
    fields = {
        **dict(summarize(samples)),
        "prefill_s": prefill_s,
        "decode_tokens_per_s": decode_rate,
        "scores": scores,
        "generations": tuple(generations[: plan.config.shown_samples]),
    }
    return fields, samples


def time_engine(engine: Engine, plan: Plan, prompt: Prompt) -> tuple[Spread, Spread]:
    """Return seconds to the first token and decoded tokens per second, after the warm-up."""
    tokens = plan.config.decode_tokens
    for _ in range(plan.config.warmup):
        time_generation(engine, prompt, tokens)
    timed = [time_generation(engine, prompt, tokens) for _ in range(plan.config.repeats)]
    return spread([prefill for prefill, _ in timed]), spread([rate for _, rate in timed])


def score_fidelity(
    engine: Engine, plan: Plan, dataset: DatasetRecord, reference: ReferenceScores
) -> list[SampleFidelity]:
    """Compare with the baseline on each stored sample.

    Raises VariantError where the engine's vocabulary is not the baseline's.
    """
    samples = []
    held = held_out(dataset, reference.num_samples)
    for sample, (log_probs, top1) in zip(held, read_reference(reference), strict=True):
        with shared_turn():
            prompt, caption = encode(engine.tokenizer, sample, plan, engine.family)
            logits = engine.score(prompt, caption)
            if logits.shape != log_probs.shape:
                raise VariantError(
                    f"scores of shape {tuple(logits.shape)} where the baseline has "
                    f"{tuple(log_probs.shape)}: the vocabularies differ"
                )
            samples.append(compare(log_probs, top1, logits, torch.tensor(caption)))
    return samples


def _device(device: str) -> str:
    """Return the device's name, a CPU's with the threads in use."""
    name = device_name(device)
    return name if device == "cuda" else f"{name}, {torch.get_num_threads()} CPU thread(s)"


def _generate(engine: Engine, plan: Plan, samples: Sequence[Sample]) -> list[Generation]:
    sampling = SamplingParams(max_tokens=plan.config.max_new_tokens)
    generations = []
    for sample in samples:
        with shared_turn():
            prompt = _prompt(engine, plan, sample)
            text = generate_text(engine, prompt, sampling).text.strip()
        shown = sample.images[-1] if sample.images else ""
        generations.append(Generation(image=shown, reference=sample.answer, text=text))
    return generations


def _prompt(engine: Engine, plan: Plan, sample: Sample) -> Prompt:
    limit = plan.run.data.max_image_pixels
    images = [open_image(file, max_pixels=limit) for file in sample.pictures]
    system = plan.run.model.system_prompt if sample.system is None else sample.system
    return make_prompt(engine, sample.asked, images, system=system)


def _open(plan: Plan, variant: Variant, folder: Path, context: int) -> Engine:
    spec = spec_for(variant.slug)
    return spec.open_engine(folder, device=plan.device, slots=1, context=context)


def _context(plan: Plan, baseline_folder: Path, dataset: DatasetRecord) -> int:
    """Return the tokens that the longest sample and answer need, by the baseline's tokenizer."""
    from transformers import AutoTokenizer

    config = plan.config
    samples = held_out(dataset, max(config.fidelity_samples, config.caption_samples))
    tokenizer = AutoTokenizer.from_pretrained(baseline_folder)
    family = family_of(baseline_folder)
    encoded = (encode(tokenizer, sample, plan, family) for sample in samples)
    longest = max(len(prompt.input_ids) + len(caption) for prompt, caption in encoded)
    return longest + max(config.max_new_tokens, config.decode_tokens + 1)


def _set_threads(plan: Plan) -> None:
    if plan.device == "cpu":
        torch.set_num_threads(max(1, int(plan.num_cpus)))
