"""The Ray Train trainer of a run, and what its failures mean."""

import os
from collections.abc import Sequence
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.storage import Storage, disk_errors
from llava_ray.config.run import RunConfig, TrainConfig
from llava_ray.errors import ConfigError, LlavaRayError
from llava_ray.train.resources import WorkerPlan
from llava_ray.train.worker import WorkerTask, train_worker


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
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.resources.wait_s)
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
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.each.num_gpus > 0,
            resources_per_worker=plan.resources(),
        ),
        torch_config=TorchConfig(backend="nccl" if plan.each.num_gpus else "gloo"),
        run_config=RayRunConfig(
            # The same name again makes Ray Train find the checkpoints of a run that was cut off.
            name="checkpoints",
            storage_path=work.uri,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.checkpoints_kept),
            callbacks=list(callbacks),
        ),
    )


def fit(trainer: TorchTrainer, train: TrainConfig) -> Result:
    """Run a trainer to its end.

    Raises the worker's own error where the user can fix it, ResourceError for a full disk,
    ConfigError for a loss that is no longer finite.
    """
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        failures = [*getattr(error, "worker_failures", {}).values()]
        # Ray Train's controller writes too: what it knows of the checkpoints.
        failures.append(getattr(error, "controller_failure", None))
        for failure in failures:
            if isinstance(failure, LlavaRayError):
                raise failure from error
            if isinstance(failure, OSError):
                with disk_errors(str(trainer.run_config.storage_path)):
                    raise failure from error
        raise
    metrics = result.metrics or {}
    if metrics.get("diverged"):
        raise ConfigError(
            f"the loss is no longer a finite number at step {metrics['step']}: lower "
            f"train.learning_rate={train.learning_rate:g} (or train.projector_learning_rate)"
        )
    return result
