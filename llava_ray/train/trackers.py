"""Where the curve of a run is written: metrics.jsonl always, trackers as the config names them."""

import importlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """What a tracking service does for a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of a step."""

    def close(self) -> None:
        """Send what is left."""


def check_trackers(train: TrainConfig) -> None:
    """Raise ConfigError when a tracker's package is missing."""
    for name in train.trackers:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            raise ConfigError(
                f"train.trackers {name!r}: needs 'pip install {_PACKAGES[name]}' "
                "on the driver's and the workers' image"
            ) from error


class MetricsFile:
    """The lines of metrics.jsonl, which travel in every checkpoint."""

    def __init__(self, earlier: Path | None) -> None:
        self.lines: list[dict[str, float]] = []
        if earlier is not None and earlier.is_file():
            self.lines = read_metrics(earlier)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line."""
        self.lines.append({"step": step, **values})

    def write(self, folder: Path) -> None:
        """Write all lines into a folder."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (folder / METRICS).write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def open_trackers(
    train: TrainConfig, *, run_id: str, folder: Path, first_step: int
) -> list[Tracker]:
    """Open the trackers of a run; a resumed run goes on in the same place."""
    makers: dict[str, Callable[[str, Path, int, TrainConfig], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
        "mlflow": _MLflow,
    }
    return [makers[name](run_id, folder, first_step, train) for name in train.trackers]


class _TensorBoard:
    def __init__(self, run_id: str, folder: Path, first_step: int, train: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_id: str, folder: Path, first_step: int, train: TrainConfig) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="llava_ray", id=run_id, resume="allow", config=train.model_dump(mode="json")
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run_id: str, folder: Path, first_step: int, train: TrainConfig) -> None:
        import mlflow

        mlflow.set_experiment("llava_ray")
        earlier = mlflow.search_runs(
            filter_string=f"tags.llava_ray_id = '{run_id}'", output_format="list"
        )
        self._mlflow: Any = mlflow
        if earlier:
            mlflow.start_run(run_id=earlier[0].info.run_id)
            return
        mlflow.start_run(run_name=run_id, tags={"llava_ray_id": run_id})
        mlflow.log_params(train.model_dump(mode="json"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
