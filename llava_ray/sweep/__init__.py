"""Search the train section through Ray Tune; each trial is a distributed run of its own."""

import logging
import shutil
from pathlib import Path

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import DatasetRecord, SweepResult, Trial
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.sweep.objective import Objective, Scorer
from llava_ray.sweep.space import check_space
from llava_ray.train import shaping_settings

logger = logging.getLogger(__name__)


def run(config: RunConfig, dataset: DatasetRecord, score: Scorer | None = None) -> SweepResult:
    """Run all trials, or those that a killed sweep had left, and return the best settings.

    `score` judges a checkpoint where the objective is not eval_loss. Raises ConfigError for a
    space or an objective that is not valid, and when no trial came to a result.
    """
    check_space(config)
    objective = Objective.parse(config.sweep.objective)
    assert (score is None) == (objective.measure == "eval_loss")
    store = ArtifactStore(config.storage.uri)
    settings = {
        "sweep": config.sweep.model_dump(mode="json", exclude={"max_concurrent_trials"}),
        **shaping_settings(config),
    }
    if score:
        # What a trial's score depends on beside its training.
        settings |= {
            "merge": config.merge.model_dump(mode="json", exclude={"probe_samples"}),
            "calibration_samples": config.quantize.calibration_samples,
            "baseline": config.benchmark.baseline,
            "caption_samples": config.benchmark.caption_samples,
            "max_new_tokens": config.benchmark.max_new_tokens,
        }
    id = artifact_id(SweepResult.kind, settings, [dataset.id])
    found = store.find(SweepResult, id)
    if found is not None:
        logger.info("sweep: %s is there already", id)
        store.remove_work(id)
        return found
    from llava_ray.sweep.pictures import write_report
    from llava_ray.sweep.search import search

    work = store.work_uri(id)
    with store.build(SweepResult, id, settings=settings, parents=[dataset.id]) as build:
        if build.found:
            return build.found
        done = search(config, dataset, work_uri=work, score=score)
        best = best_trial(done.trials)
        assert best.value is not None
        write_report(done, best, build.folder, objective=objective.label)
        if store.storage.is_local:
            # TensorBoard's hparams page compares what Ray Tune wrote of each trial.
            for file in (Path(work) / "tune").glob("*/events.out.tfevents.*"):
                folder = build.folder / "tensorboard" / file.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
        record = build.finish(
            SweepResult,
            device=done.device,
            objective=objective.label,
            best=best.settings,
            best_value=best.value,
            steps=sum(trial.steps for trial in done.trials),
            steps_without_early_stop=done.steps_per_trial * len(done.trials),
            trials=done.trials,
        )
    store.remove_work(id)
    return record


def best_trial(trials: tuple[Trial, ...]) -> Trial:
    """Return the trial of the smallest objective among those that ran to the end.

    Where none did, those stopped early count. Raises ConfigError when no trial has an objective.
    """
    scored = [trial for trial in trials if trial.value is not None]
    if not scored:
        reasons = "; ".join(sorted({trial.error or trial.status for trial in trials}))
        raise ConfigError(f"no trial of the sweep came to a result: {reasons}")
    finished = [trial for trial in scored if trial.status == "finished"]
    return min(finished or scored, key=lambda trial: trial.value or 0.0)
