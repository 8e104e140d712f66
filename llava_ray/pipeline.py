"""The whole line. Each function runs one stage and, first, those it rests on.

Finished artifacts are found by their ids, so asking for the last stage does only what is missing.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from llava_ray import benchmark, choose, deploy, merge, prepare, quantize, sweep, train
from llava_ray.artifacts.records import (
    AdapterCheckpoint,
    ChosenVariant,
    DatasetRecord,
    DeploymentRecord,
    MergedModel,
    Scorecard,
    SweepResult,
    Variant,
    VariantFailure,
)
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.trial_score import scorer_for

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run_prepare(config: RunConfig) -> DatasetRecord:
    """Turn captions and images into LLaVA JSON."""
    return _stage("prepare", lambda: prepare.run(config))


def run_sweep(config: RunConfig) -> SweepResult:
    """Search the train section's settings.

    Raises ConfigError when sweep.space is empty or sweep.objective unknown.
    """
    if not config.sweep.space:
        raise ConfigError("sweep.space is empty: name keys of train, such as learning_rate")
    score = scorer_for(config)
    dataset = run_prepare(config)
    return _stage("sweep", lambda: sweep.run(config, dataset, score))


def run_train(config: RunConfig) -> AdapterCheckpoint:
    """Fine-tune, with the sweep's best settings if a sweep is asked for."""
    dataset = run_prepare(config)
    if config.sweep.space:
        config = sweep.best_config(config, run_sweep(config))
    return _stage("train", lambda: train.run(config, dataset))


def run_merge(config: RunConfig) -> MergedModel:
    """Fold the adapter into the base."""
    adapter = run_train(config)
    return _stage("merge", lambda: merge.run(config, adapter))


def run_quantize(config: RunConfig) -> list[Variant | VariantFailure]:
    """Make all variants, in parallel."""
    dataset, merged = run_prepare(config), run_merge(config)
    return _stage("quantize", lambda: quantize.run(config, merged, dataset))


def run_benchmark(config: RunConfig) -> list[Scorecard | VariantFailure]:
    """Measure all variants."""
    dataset, variants = run_prepare(config), run_quantize(config)
    return _stage("benchmark", lambda: benchmark.run(config, variants, dataset))


def run_choose(config: RunConfig) -> ChosenVariant:
    """Pick the winner and write the report."""
    measured = run_benchmark(config)
    scorecards = [card for card in measured if isinstance(card, Scorecard)]
    failures = [failure for failure in measured if isinstance(failure, VariantFailure)]
    return _stage("choose", lambda: choose.run(config, scorecards, failures))


def run_deploy(config: RunConfig, chosen: ChosenVariant | None = None) -> DeploymentRecord:
    """Serve the winner, or the variant that was chosen before."""
    winner = run_choose(config) if chosen is None else chosen
    return _stage("deploy", lambda: deploy.run(config, winner))


def _stage(name: str, work: Callable[[], T]) -> T:
    start = time.monotonic()
    logger.info("%s: starts", name)
    result = work()
    logger.info("%s: done in %.1f s", name, time.monotonic() - start)
    return result
