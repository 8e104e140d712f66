"""Where the curve of a run is written: metrics.jsonl always, trackers as the config names them."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from llava_ray.config.run import TrainConfig

METRICS = "metrics.jsonl"

Log = Callable[[int, Mapping[str, float]], None]
"""Records values of a step."""


def write_metrics(lines: Sequence[dict[str, float]], path: Path) -> None:
    """Write a metrics.jsonl."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def open_trackers(
    stack: ExitStack, train: TrainConfig, run_id: str, folder: Path, first_step: int
) -> list[Log]:
    """Open the trackers of a run until the stack ends; a resumed run goes on in the same place."""
    makers = {
        "tensorboard": lambda: _tensorboard(stack, folder, first_step),
        "wandb": lambda: _wandb(stack, run_id, train),
        "mlflow": lambda: _mlflow(stack, run_id, train),
    }
    return [makers[name]() for name in train.trackers]


def _tensorboard(stack: ExitStack, folder: Path, first_step: int) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
    stack.callback(writer.close)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"train/{name}", value, step)

    return log


def _wandb(stack: ExitStack, run_id: str, train: TrainConfig) -> Log:
    import wandb

    config = train.model_dump(mode="json")
    run = stack.enter_context(
        wandb.init(project="llava_ray", id=run_id, resume="allow", config=config)
    )
    return lambda step, values: run.log(dict(values), step=step)


def _mlflow(stack: ExitStack, run_id: str, train: TrainConfig) -> Log:
    import mlflow

    mlflow.set_experiment("llava_ray")
    earlier = mlflow.search_runs(
        filter_string=f"tags.llava_ray_id = '{run_id}'", output_format="list"
    )
    if earlier:
        stack.enter_context(mlflow.start_run(run_id=earlier[0].info.run_id))
    else:
        stack.enter_context(mlflow.start_run(run_name=run_id, tags={"llava_ray_id": run_id}))
        mlflow.log_params(train.model_dump(mode="json"))
    return lambda step, values: mlflow.log_metrics(dict(values), step=step)
