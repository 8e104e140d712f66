"""One trial: a training run of its own under Ray Train, whose reports go on to Ray Tune.

A class, where Ray's examples have a function with TuneReportCallback, for two reasons. Tune calls
`cleanup` before it ends a trial early, which lets go of the workers; a function is just killed, and
its workers' placement group then waits for a dashboard that need not be there. And checkpoints
reach Tune too, as paths, so that population based training can start a trial from another's.
"""

import logging
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import Checkpoint, UserCallback
from ray.util.queue import Empty, Queue

from llava_ray.artifacts.records import DatasetRecord, Frozen
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.sweep.objective import Scorer
from llava_ray.sweep.space import with_settings
from llava_ray.train.resources import WorkerPlan
from llava_ray.train.trainer import fit, make_trainer

logger = logging.getLogger(__name__)

_LET_GO_S = 20.0


class TrialTask(Frozen):
    """What every trial of a sweep shares."""

    config: RunConfig
    dataset: DatasetRecord
    plan: WorkerPlan
    work_uri: str
    report_every_steps: int
    judged_reports: frozenset[int]
    """Which reports, counted from 1, a `Scorer` judges beside the last: merging, quantizing and
    writing captions takes longer than the training between two of them."""
    reports: int
    """All that a trial makes."""


class TrialRun(tune.Trainable):
    """Trains with the settings that Tune drew; every result carries `objective`."""

    def setup(
        self, config: dict[str, Any], task: TrialTask | None = None, score: Scorer | None = None
    ) -> None:
        """Take the settings; training starts at the first step, after a checkpoint was loaded."""
        assert task is not None
        self._task, self._score = task, score
        # Training goes on while a checkpoint is scored, or before another trial starts from it.
        all_kept = score is not None or task.config.sweep.scheduler == "pbt"
        own = {
            "eval_every_steps": task.report_every_steps,
            "checkpoint_every_steps": task.report_every_steps,
            # Tune's last checkpoint of a trial may be older than the trial's own last one.
            "checkpoints_kept": task.reports + 1 if all_kept else 3,
            "trackers": (),
        }
        train = with_settings(task.config.train, {**config, **own})
        self._run_config = task.config.model_copy(update={"train": train})
        self._reports: Queue = Queue(actor_options={"num_cpus": 0})
        self._path: str | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._controller: Any = None

    def step(self) -> dict[str, Any]:
        """Wait for the next judged evaluation; raises what ended the training."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._fit, daemon=True)
            self._thread.start()
        last, judged = False, False
        while not (last or judged):
            metrics, path, self._controller = self._next_report()
            # Ray's paths of a remote storage lack their scheme.
            scheme, separator, _ = self._task.work_uri.partition("://")
            path = f"{scheme}://{path}" if path and separator else path
            self._path = path or self._path
            value = metrics["eval_loss"]
            last = "device" in metrics or not math.isfinite(value)
            number = metrics["step"] // self._task.report_every_steps
            judged = self._score is None or number in self._task.judged_reports
        if self._score is not None and math.isfinite(value):
            assert path is not None
            value = self._judge(path, metrics["step"])
        if last:
            self._thread.join()
            # A loss that is not finite is a result, not an error.
            if self._failure is not None and not isinstance(self._failure, ConfigError):
                raise self._failure
        return {**metrics, "objective": value, "done": last}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, str | None]:
        """Say where the training's last checkpoint lies; Tune keeps it."""
        return {"path": self._path}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a checkpoint, this trial's or another's."""
        self._path = checkpoint["path"]

    def cleanup(self) -> None:
        """Let go of the workers of a trial that Tune ends early."""
        if self._thread is None or not self._thread.is_alive() or self._controller is None:
            return
        try:
            ray.get(self._controller.abort.remote(), timeout=_LET_GO_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.info("sweep: trial %s ended (%s)", self.trial_id, type(error).__name__)

    def _fit(self) -> None:
        # Not the trial's name alone: Ray Train would go on from this trial's own last checkpoint
        # where population based training wants another trial's.
        part = "start" if self._path is None else Path(self._path).name
        make = partial(
            make_trainer,
            self._run_config,
            self._task.dataset,
            self._task.plan,
            run_id=f"trial-{self.trial_id}",
            work_uri=f"{self._task.work_uri}/trials/{self.trial_id}-{part}",
            callbacks=[_Forwarder(self._reports)],
            start_from=self._path,
            export_always=self._score is not None,
        )
        try:
            fit(make, self._run_config.train)
        except BaseException as error:
            self._failure = error

    def _judge(self, path: str, step: int) -> float:
        """Score a checkpoint in a task outside the trial's placement group.

        Tasks that are started inside share its resources, and it has no CPU.
        """
        score: Any = self._score
        remote: Any = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(score)
        task = remote.remote(self._run_config, self._task.dataset, path, step)
        try:
            return float(ray.get(task))
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None

    def _next_report(self) -> tuple[dict[str, Any], str | None, Any]:
        assert self._thread is not None
        while True:
            alive = self._thread.is_alive()
            try:
                report: tuple[dict[str, Any], str | None, Any] = self._reports.get(timeout=1.0)
                return report
            except Empty:
                if not alive:
                    raise self._failure or RuntimeError("training ended without a report") from None


class _Forwarder(UserCallback):
    """Runs in Train's controller: sends rank 0's reports and the controller to the trial."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        if "eval_loss" in metrics[0]:
            controller = ray.get_runtime_context().current_actor
            path = checkpoint.path if checkpoint else None
            self._reports.put((dict(metrics[0]), path, controller))
