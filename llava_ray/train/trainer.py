"""The Ray Train trainer of a run, and what its failures mean."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

from llava_ray.artifacts.faults import disk_fault, is_gone
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import RunConfig, TrainConfig
from llava_ray.errors import ConfigError, LlavaRayError, ResourceError
from llava_ray.resources.crash import last_line
from llava_ray.train.resources import WorkerPlan
from llava_ray.train.unfinished import CHECKPOINTS
from llava_ray.train.worker import WorkerTask, train_worker

logger = logging.getLogger(__name__)

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_TRIES = 3
"""How often a run goes on after its storage was gone or its controller failed; Ray Train's own
tries know neither pause nor end."""


def make_trainer(
    config: RunConfig,
    dataset: DatasetRecord,
    plan: WorkerPlan,
    *,
    run_id: str,
    work_uri: str,
    callbacks: Sequence[Any] = (),
    start_from: str | None = None,
    export_always: bool = False,
) -> TorchTrainer:
    """Return a trainer that goes on from the last checkpoint below `work_uri`, if there is one.

    Without one it starts at the checkpoint `start_from`, or from the base model.
    """
    work = Storage(work_uri)
    # Ray Train's own is a minute; it is read from the environment alone.
    os.environ[_START_TIMEOUT] = str(config.resources.wait_s)
    task = WorkerTask(
        run_id=run_id,
        config=config,
        dataset=dataset,
        live_folder=work.uri if work.is_local else None,
        start_from=start_from,
        export_always=export_always,
    )
    return TorchTrainer(
        # Ray hands the worker function its config as it is; only the type hints say dict.
        train_worker,  # type: ignore[arg-type]
        train_loop_config=task,  # type: ignore[arg-type]
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.each.num_gpus > 0,
            resources_per_worker=plan.resources(),
        ),
        torch_config=TorchConfig(backend="nccl" if plan.each.num_gpus else "gloo"),
        run_config=ray.train.RunConfig(
            # The same name again makes Ray Train find the checkpoints of a run that was cut off.
            name=CHECKPOINTS,
            storage_path=work.uri,
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                controller_failure_limit=0,  # type: ignore[call-arg]
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.checkpoints_kept),
            callbacks=list(callbacks),
        ),
    )


def fit(make: Callable[[], TorchTrainer], train: TrainConfig) -> ray.train.Result:
    """Run a trainer to its end, anew from its last checkpoint where its storage was gone meanwhile.

    Raises the worker's own error where the user can fix it, StorageError for a full disk or a
    storage that stays away, ResourceError for workers that die or find no node, ConfigError for a
    loss that is no longer finite.
    """
    tries = 0
    while True:
        trainer = make()
        try:
            result = trainer.fit()
            break
        except (ray.train.TrainingFailedError, OSError, RayActorError) as error:
            where = str(trainer.run_config.storage_path)
            failures = _failures(error)
            each = trainer.scaling_config.resources_per_worker
            for failure in failures:
                if fault := _fault(failure, where, each):
                    raise fault from error
            # What is no failure of training is the controller's own end, as where it cannot start.
            controller = isinstance(error, ray.train.ControllerError | RayActorError)
            gone = any(map(is_gone, failures))
            lost = any(isinstance(failure, RayActorError) for failure in failures)
            if lost and not (controller or gone):
                raise ResourceError(
                    f"train: a worker died, {train.max_failures + 1} times in all "
                    "(train.max_failures): its node was lost or ran out of memory; the same "
                    "command goes on from the last checkpoint"
                ) from error
            tries += 1
            if tries > _TRIES and controller:
                raise ResourceError(f"train: {last_line(str(failures[-1]))}") from error
            if tries > _TRIES or not (gone or controller):
                raise
            what = f"{where} was gone" if gone else last_line(str(failures[-1]))
            logger.warning("train: %s; goes on from the last checkpoint", what)
            Storage(where).read_text("probe")  # Waits until it answers.
    metrics = result.metrics or {}
    if metrics.get("diverged"):
        raise ConfigError(
            f"the loss is no longer a finite number at step {metrics['step']}: lower "
            f"train.learning_rate={train.learning_rate:g} (or train.projector_learning_rate)"
        )
    return result


def _failures(error: BaseException) -> list[BaseException]:
    """Return what a training failed of; Ray Train's controller writes too, of the checkpoints."""
    found = [*getattr(error, "worker_failures", {}).values()]
    found.append(getattr(error, "controller_failure", None) or error)
    # Of a worker that is gone Train tells that it could not ask it, and why.
    return [getattr(failure, "health_check_failure", failure) for failure in found]


def _fault(failure: BaseException, where: str, each: object) -> LlavaRayError | None:
    # The class is not among Ray Train's public ones.
    if type(failure).__name__ == "WorkerGroupStartupTimeoutError":
        workers = getattr(failure, "num_workers", "all")
        return ResourceError(
            f"train: nodes for {workers} worker(s) of {each} did not come within resources.wait_s="
            f"{os.environ[_START_TIMEOUT]}: raise it, or ask for less (train.num_workers, "
            "train.cpus_per_worker, resources.accelerator)"
        )
    return failure if isinstance(failure, LlavaRayError) else disk_fault(failure, where)
