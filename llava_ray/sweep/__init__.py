"""Search the train section through Ray Tune; each trial is a distributed run of its own."""

import logging
import shutil
from typing import Any

from llava_ray.artifacts import ArtifactStore, DatasetRecord, SweepResult, Trial, artifact_id
from llava_ray.config import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.sweep.space import check_space, with_settings
from llava_ray.train import shaping_settings

logger = logging.getLogger(__name__)


def run(config: RunConfig, dataset: DatasetRecord, score: Any = None) -> SweepResult:
    """Run all trials, or those that a killed sweep had left, and return the best settings.

    `score` (a `trial.Scorer`) judges a checkpoint where the objective is not eval_loss. Raises
    ConfigError for a space that is not valid, and when no trial came to a result.
    """
    check_space(config)
    if config.sweep.objective != "eval_loss" and score is None:
        raise ConfigError(
            f"sweep.objective {config.sweep.objective!r}: use eval_loss, rouge_l or "
            "'rouge_l after <variant slug>' with a slug of quantize.variants"
        )
    store = ArtifactStore(config.storage.uri)
    settings = {
        "sweep": config.sweep.model_dump(mode="json", exclude={"max_concurrent_trials"}),
        **shaping_settings(config),
    }
    id = artifact_id(SweepResult.kind, settings, [dataset.id])
    found = store.find(SweepResult, id)
    if found is not None:
        logger.info("sweep: %s is there already", id)
        return found
    from llava_ray.sweep.pictures import write_report
    from llava_ray.sweep.search import search

    work = store.work_uri(id)
    with store.build(SweepResult, id, settings=settings, parents=[dataset.id]) as build:
        done = search(config, dataset, work_uri=work, score=score)
        best = best_trial(done.trials)
        assert best.value is not None
        write_report(done, best, build.folder, objective=config.sweep.objective)
        record = build.finish(
            SweepResult,
            device=done.device,
            objective=config.sweep.objective,
            best=best.settings,
            best_value=best.value,
            steps=sum(trial.steps for trial in done.trials),
            steps_without_early_stop=done.steps_per_trial * len(done.trials),
            trials=done.trials,
        )
    if store.storage.is_local:
        shutil.rmtree(work, ignore_errors=True)
    return record


def best_config(config: RunConfig, result: SweepResult) -> RunConfig:
    """Return the config with the best trial's settings in its train section."""
    return config.model_copy(update={"train": with_settings(config.train, result.best)})


def best_trial(trials: tuple[Trial, ...]) -> Trial:
    """Return the trial of the smallest objective among those that ran to the end.

    Raises ConfigError when no trial has one.
    """
    scored = [trial for trial in trials if trial.value is not None]
    if not scored:
        reasons = "; ".join(sorted({trial.error or trial.status for trial in trials}))
        raise ConfigError(f"no trial of the sweep came to a result: {reasons}")
    finished = [trial for trial in scored if trial.status == "finished"]
    return min(finished or scored, key=lambda trial: trial.value or 0.0)
