"""The whole line. Each function runs one stage and, first, those it rests on.

Finished artifacts are found by their ids, so asking for the last stage does only what is missing.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from llava_ray import benchmark, choose, deploy, merge, prepare, quantize, sweep, train
from llava_ray.artifacts import records
from llava_ray.artifacts.inventory import made_from
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.benchmark.plan import check_dataset
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import ConfigError
from llava_ray.sweep.space import check_space
from llava_ray.trial_score import scorer_for

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STARTED = datetime.now(UTC).isoformat(timespec="seconds")
"""When this process did; what it makes itself is not made twice by storage.force."""


def run_prepare(config: RunConfig) -> records.DatasetRecord:
    """Turn captions and images into LLaVA JSON."""
    return _stage("prepare", prepare.run, config)


def run_sweep(config: RunConfig) -> records.SweepResult:
    """Search the train section's settings.

    Raises ConfigError for a wrong or empty sweep.space and for an unknown sweep.objective.
    """
    check_space(config)
    score = scorer_for(config)
    return _stage("sweep", sweep.run, config, run_prepare(config), score)


def run_train(config: RunConfig) -> records.AdapterCheckpoint:
    """Fine-tune, with the sweep's best settings if a sweep is asked for."""
    dataset = run_prepare(config)
    if config.sweep.space:
        config = changed(config, train=run_sweep(config).best)
    return _stage("train", train.run, config, dataset)


def run_merge(config: RunConfig) -> records.MergedModel:
    """Fold the adapter into the base."""
    return _stage("merge", merge.run, config, run_train(config))


def run_quantize(config: RunConfig) -> list[records.Variant | records.VariantFailure]:
    """Make all variants, in parallel."""
    return _stage("quantize", quantize.run, config, run_merge(config), run_prepare(config))


def run_benchmark(config: RunConfig) -> list[records.Scorecard | records.VariantFailure]:
    """Measure all variants."""
    # Known before anything is trained.
    check_dataset(run_prepare(config))
    return _stage("benchmark", benchmark.run, config, run_quantize(config), run_prepare(config))


def run_choose(config: RunConfig) -> records.ChosenVariant:
    """Pick the winner and write the report.

    Raises ConfigError where there is nothing to choose from, before anything is trained.
    """
    others = set(config.quantize.variants) - {config.benchmark.baseline}
    if not others and not config.choose.may_choose_baseline:
        raise ConfigError(
            f"quantize.variants has only the baseline {config.benchmark.baseline}: add a variant, "
            "or set choose.may_choose_baseline=true"
        )
    measured = run_benchmark(config)
    scorecards = [card for card in measured if isinstance(card, records.Scorecard)]
    failures = [failure for failure in measured if isinstance(failure, records.VariantFailure)]
    return _stage("choose", choose.run, config, scorecards, failures)


def run_deploy(
    config: RunConfig, chosen: records.ChosenVariant | None = None
) -> records.DeploymentRecord:
    """Serve the winner, or the variant that was chosen before."""
    return _stage("deploy", deploy.run, config, chosen or run_choose(config))


def _stage(name: str, run: Callable[..., T], config: RunConfig, *arguments: Any) -> T:
    start = time.monotonic()
    logger.info("%s: starts", name)
    result = run(config, *arguments)
    if name in config.storage.force and _delete_older(config, result):
        result = run(config, *arguments)
    logger.info("%s: done in %.1f s", name, time.monotonic() - start)
    return result


def _delete_older(config: RunConfig, result: object) -> list[records.Record]:
    """Delete what a stage found finished, and what was made from it; return what went."""
    results = result if isinstance(result, list) else [result]
    older = [r for r in results if isinstance(r, records.Record) and r.created < _STARTED]
    if older:
        store = ArtifactStore(config.storage.uri)
        older = made_from(store.everything(), older)
        logger.info("storage.force: deletes %s", ", ".join(record.id for record in older))
        store.delete(older)
    return older
