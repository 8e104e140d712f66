"""Measure every variant in a process of its own: size, memory, speed, fidelity and captions."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from llava_ray.artifacts.records import (
    DatasetRecord,
    ReferenceScores,
    Scorecard,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.benchmark.plan import Plan, check_dataset, check_room, is_model, make_plan
from llava_ray.benchmark.turns import shared_turn
from llava_ray.config.run import RunConfig
from llava_ray.console import Progress
from llava_ray.errors import ConfigError, LlavaRayError, VariantError
from llava_ray.resources.capacity import find_fleet, model_up
from llava_ray.resources.forked import Forked
from llava_ray.resources.tasks import Task, run_side_by_side, run_task

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SMALL_BYTES = 2**30


def run(
    config: RunConfig, variants: Sequence[Variant | VariantFailure], dataset: DatasetRecord
) -> list[Scorecard | VariantFailure]:
    """Return a scorecard or the reason for its lack per variant, in the order given.

    Finished scorecards are found, not measured again. Raises VariantError when the baseline,
    against which the others are measured, cannot be scored itself.
    """
    from llava_ray.benchmark.measure import scorecard_prefix

    check_dataset(dataset)
    baseline = find_baseline(config, variants)
    fleet = find_fleet(config)
    plan = make_plan(config, fleet)
    if config.resources.node_types == "up" and not plan.model:
        plan = replace(plan, model=model_up(gpu=plan.device == "cuda"))
    store = ArtifactStore(config.storage.uri)
    results: dict[str, Scorecard | VariantFailure] = {}
    missing: list[Variant] = []
    for variant in variants:
        if isinstance(variant, VariantFailure):
            results[variant.slug] = variant
            continue
        others = dataset.id, plan.reference_id(baseline, dataset)
        prefix = scorecard_prefix(plan, variant, *others)
        if card := _found(plan, store.find_all(Scorecard, f"{prefix}-")):
            results[variant.slug] = card
        else:
            missing.append(variant)
    if missing:
        check_room(plan, fleet)
        reference = _reference(plan, baseline, dataset)
        results.update(_measure_all(plan, missing, baseline, dataset, reference))
    return [results[variant.slug] for variant in variants]


def _found(plan: Plan, cards: Sequence[Scorecard]) -> Scorecard | None:
    """Return the one that was measured on the device wanted.

    Raises ConfigError where it was measured on several.
    """
    wanted = [card for card in cards if is_model(card.device_name, plan.model)]
    if len(wanted) > 1:
        names = ", ".join(sorted(card.device_name for card in wanted))
        raise ConfigError(
            f"{wanted[0].slug} was measured on {names}: set benchmark.device to a part of the name "
            "of one"
        )
    return wanted[0] if wanted else None


def score_captions(config: RunConfig, variant: Variant, dataset: DatasetRecord) -> dict[str, float]:
    """Return the caption scores of one variant on the held-out split, and nothing else of it.

    Names and ranges are those of `Scorecard.scores`. Raises VariantError where it cannot be
    measured.
    """
    from llava_ray.benchmark.measure import measure_captions

    check_dataset(dataset)
    plan = make_plan(config, find_fleet(config))
    return _run(f"captions of {variant.slug!r}", measure_captions, plan, variant, dataset)


def find_baseline(config: RunConfig, variants: Sequence[Variant | VariantFailure]) -> Variant:
    """Return the variant that fidelity is measured against.

    Raises VariantError where it is missing or failed.
    """
    slug = config.benchmark.baseline
    for variant in variants:
        if variant.slug != slug:
            continue
        if isinstance(variant, VariantFailure):
            raise VariantError(f"baseline {slug!r} failed, so nothing compares: {variant.reason}")
        return variant
    raise VariantError(f"baseline {slug!r} is not among the variants: add it to quantize.variants")


def _reference(plan: Plan, baseline: Variant, dataset: DatasetRecord) -> ReferenceScores:
    """Find or make the baseline's log probabilities."""
    from llava_ray.benchmark.measure import score_baseline

    store = ArtifactStore(plan.run.storage.uri)
    if found := store.find(ReferenceScores, plan.reference_id(baseline, dataset)):
        return found
    failure = f"baseline {baseline.slug!r} cannot be scored, so nothing compares"
    return _run(failure, score_baseline, plan, baseline, dataset)


def _measure_all(
    plan: Plan, missing: Sequence[Variant], *others: Any
) -> dict[str, Scorecard | VariantFailure]:
    """Measure variants side by side, timings apart; a failure stays with its variant.

    others: what `measure` takes beside the plan and a variant.
    """
    from llava_ray.benchmark.measure import measure

    progress = Progress("benchmark", len(missing), "variants", every_s=0)
    # PyTorch's variants take longest on a CPU, so llama.cpp's fill the end.
    ordered = sorted(missing, key=lambda variant: variant.method == "gguf")
    results: dict[str, Scorecard | VariantFailure] = {}
    tasks = [_task(measure, plan, variant, *others) for variant in ordered]
    slugs = {task.name: variant.slug for task, variant in zip(tasks, ordered, strict=True)}
    # Ray counts CPUs and GPUs but no memory here, so large models on CPUs come one by one.
    small = max(variant.size_bytes for variant in missing) < _SMALL_BYTES
    most = plan.config.max_parallel or (len(missing) if small or plan.device == "cuda" else 1)
    for task, outcome in run_side_by_side(tasks, at_once=most, wait_s=plan.run.resources.wait_s):
        slug = slugs[task.name]
        if isinstance(outcome, LlavaRayError):
            logger.warning("%s: not measured: %s", slug, outcome)
            results[slug] = VariantFailure(slug=slug, reason=f"benchmark: {outcome}")
        else:
            results[slug] = outcome
        progress.at(len(results), f"last {slug}")
    return results


def _run(failure: str, work: Callable[..., T], plan: Plan, variant: Variant, *others: Any) -> T:
    """Run one task to its end; raises VariantError that begins with `failure`."""
    try:
        return run_task(_task(work, plan, variant, *others), wait_s=plan.run.resources.wait_s)
    except LlavaRayError as error:
        raise VariantError(f"{failure}: {error}") from error


def _task(work: Callable[..., T], plan: Plan, variant: Variant, *others: Any) -> Task[T]:
    """Return a task whose work runs in a process of its own, so peak memory is of it alone."""
    name, arguments = f"{work.__name__} {variant.slug}", (plan, variant, *others)
    return Task(name, plan.resources, work, arguments, entry=_run_apart)


def _run_apart(name: str, work: Callable[..., T], *arguments: Any) -> T:
    """Do the work in a child, whose start and imports disturb no timing."""
    with shared_turn():
        child = Forked(name, work, *arguments)
    with child:
        return child.result()
