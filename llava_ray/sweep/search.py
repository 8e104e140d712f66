"""Ray Tune: scheduler, search algorithm, resumption, and the table of trials."""

import errno
import logging
import math
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

from ray import tune
from ray.tune import schedulers
from ray.tune.search import BasicVariantGenerator

from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.records import DatasetRecord, Trial
from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import RunConfig, TrainConfig
from llava_ray.config.section import need_package
from llava_ray.console import Progress
from llava_ray.resources.capacity import Fleet, find_fleet
from llava_ray.sweep.objective import Scorer
from llava_ray.sweep.space import domains, num_samples
from llava_ray.sweep.trial import TrialRun, TrialTask
from llava_ray.train.resources import WorkerPlan, plan_workers

logger = logging.getLogger(__name__)

_REPORTS = 9
"""How often a trial is judged; with ASHA's factor 3 that makes rungs at 1/9, 1/3 and the end."""

_FACTOR = 3

_JUDGED: dict[str, frozenset[int]] = {
    "asha": frozenset({1, _FACTOR}),
    "pbt": frozenset({_REPORTS // _FACTOR, 2 * _REPORTS // _FACTOR}),
    "fifo": frozenset(),
}
"""The reports that each scheduler decides on, without the last."""


@dataclass(frozen=True)
class Search:
    """What a search came to."""

    trials: tuple[Trial, ...]
    curves: tuple[tuple[tuple[int, float], ...], ...]
    """The (step, objective) of each report, for every trial."""
    steps_per_trial: int
    device: str


def search(
    config: RunConfig, dataset: DatasetRecord, *, work_uri: str, score: Scorer | None
) -> Search:
    """Run the trials of a sweep, leaving out those that an earlier run below `work_uri` ended.

    Raises StorageError for a full disk.
    """
    fleet, train = find_fleet(config), config.train
    if train.cpus_per_worker is None and not fleet.gpu:
        # One CPU for each trial's worker, so that several trials run at a time.
        train = train.model_copy(update={"cpus_per_worker": 1})
    plan = plan_workers(train, fleet)
    total = total_steps(train, plan, dataset.num_train)
    task = TrialTask(
        config=config,
        dataset=dataset,
        plan=plan,
        work_uri=work_uri,
        report_every_steps=max(1, total // _REPORTS),
        judged_reports=_JUDGED[config.sweep.scheduler],
        reports=-(-total // max(1, total // _REPORTS)),
    )
    # Tune gives the trial's own process no CPU: it only waits for the workers.
    trainable = tune.with_resources(
        tune.with_parameters(TrialRun, task=task, score=score), {"CPU": 0, "memory": 1}
    )
    places = concurrent_trials(plan, fleet, scored=score is not None)
    tuner = _tuner(config, trainable, places, total, Storage(work_uri).uri)
    with disk_errors(work_uri):
        try:
            grid = tuner.fit()
        except (EOFError, UnpicklingError) as error:
            # Tune reads trials' errors from files, and goes on where it could not write them.
            raise OSError(errno.ENOSPC, "a trial's error is cut short") from error
    results = [grid[index] for index in range(len(grid))]
    devices = [(result.metrics or {}).get("device") for result in results]
    return Search(
        trials=tuple(_row(number, r, total, config) for number, r in enumerate(results)),
        curves=tuple(_curve(result) for result in results),
        steps_per_trial=total,
        device=next((name for name in devices if name), "cuda" if plan.each.num_gpus else "cpu"),
    )


def total_steps(train: TrainConfig, plan: WorkerPlan, num_train: int) -> int:
    """Return the optimizer steps of a whole run."""
    per_step = train.batch_size * train.gradient_accumulation * plan.num_workers
    steps = max(1, math.ceil(int(train.epochs * num_train) / per_step))
    return min(steps, train.max_steps) if train.max_steps else steps


def concurrent_trials(plan: WorkerPlan, fleet: Fleet, *, scored: bool = False) -> int:
    """Return how many trials the cluster holds; more would wait for each other's workers.

    Scored trials leave one place free for merging and quantizing. Where there is but one, a trial
    is scored after its training's end, and stopping early saves nothing. See
    https://github.com/ray-project/ray/issues/38505.
    """
    places = fleet.total(plan.each) // plan.num_workers
    return max(1, places - 1 if scored else places)


def _tuner(config: RunConfig, trainable: Any, concurrent: int, total: int, work: str) -> tune.Tuner:
    if tune.Tuner.can_restore(f"{work}/tune"):
        logger.info("sweep: goes on with the trials that an earlier run left")
        # With its space, which Tune needs where a full disk has cut short what it knew of trials.
        return tune.Tuner.restore(
            f"{work}/tune", trainable, resume_unfinished=True,
            param_space=domains(config.sweep.space),
        )  # fmt: skip
    concurrent = config.sweep.max_concurrent_trials or concurrent
    logger.info("sweep: %d trial(s) of %d steps at a time", concurrent, total)
    return tune.Tuner(
        trainable,
        param_space=domains(config.sweep.space),
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            num_samples=num_samples(config.sweep),
            max_concurrent_trials=concurrent,
            scheduler=_scheduler(config, total),
            search_alg=_search_algorithm(config, concurrent),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=work,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            # All are kept: they are paths alone, and another trial may start from an older one.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[_TrialProgress()],
        ),
    )


def _scheduler(config: RunConfig, total: int) -> Any:
    if config.sweep.scheduler == "asha":
        return schedulers.AsyncHyperBandScheduler(
            time_attr="step",
            max_t=total,
            grace_period=max(1, total // _REPORTS),
            reduction_factor=_FACTOR,
        )
    if config.sweep.scheduler == "pbt":
        return schedulers.PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=max(1, total // _FACTOR),
            hyperparam_mutations=domains(config.sweep.space),
        )
    return schedulers.FIFOScheduler()  # type: ignore[no-untyped-call]


def _search_algorithm(config: RunConfig, concurrent: int) -> Any:
    if config.sweep.search == "random":
        return BasicVariantGenerator(random_state=config.sweep.seed, max_concurrent=concurrent)
    need_package("sweep.search 'optuna'", "optuna", "llava_ray[optuna]")
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric="objective", mode="min", seed=config.sweep.seed)


class _TrialProgress(tune.Callback):
    def __init__(self) -> None:
        self._done, self._progress = 0, Progress("sweep", 0, "trials", every_s=0)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._done += 1
        self._progress.total = len(trials)  # Those that are drawn so far.
        self._progress.at(self._done)


def _row(number: int, result: Any, total: int, config: RunConfig) -> Trial:
    metrics = result.metrics or {}
    value, steps = metrics.get("objective"), int(metrics.get("step") or 0)
    error = " ".join(str(result.error).split())[-500:] if result.error else None
    if error:
        status = "failed"
    elif value is None or not math.isfinite(value):
        status = "diverged"
    else:
        status = "finished" if steps >= total else "stopped early"
    return Trial(
        number=number,
        status=status,  # type: ignore[arg-type]
        settings={key: metrics.get("config", result.config)[key] for key in config.sweep.space},
        value=float(value) if value is not None and math.isfinite(value) else None,
        steps=steps,
        error=error,
    )


def _curve(result: Any) -> tuple[tuple[int, float], ...]:
    frame = result.metrics_dataframe
    if frame is None or "objective" not in frame:
        return ()
    rows = zip(frame["step"], frame["objective"], strict=True)
    return tuple((int(step), float(value)) for step, value in rows if math.isfinite(value))
