"""How many workers, with what each, and whether the cluster can ever hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import Resources


@dataclass(frozen=True)
class WorkerPlan:
    """What the training asks of the cluster."""

    num_workers: int
    each: Resources

    def resources(self) -> dict[str, float]:
        """Return one worker's resources as Ray Train names them."""
        gpus = {"GPU": self.each.num_gpus} if self.each.num_gpus else {}
        return {"CPU": self.each.num_cpus, **gpus}


def plan_workers(train: TrainConfig, nodes: Sequence[Resources]) -> WorkerPlan:
    """Choose workers for a cluster's nodes.

    Raises ResourceError when the cluster could not hold them even if it were idle, and
    ConfigError when a precision needs GPUs that are not there.
    """
    total_gpus = int(sum(node.num_gpus for node in nodes))
    num_workers = train.num_workers or max(1, total_gpus)
    if train.precision == "fp16" and not total_gpus:
        raise ConfigError("train.precision='fp16' needs GPUs, and the cluster has none: use fp32")
    cpus = train.cpus_per_worker or _default_cpus(num_workers, nodes, total_gpus)
    plan = WorkerPlan(num_workers, Resources(cpus, 1 if total_gpus else 0))
    if room(plan, nodes) < num_workers:
        there = ", ".join(f"{n.num_cpus:g} CPUs + {n.num_gpus:g} GPUs" for n in nodes) or "nothing"
        raise ResourceError(
            f"train.num_workers={num_workers} with {cpus:g} CPUs and {plan.each.num_gpus:g} GPUs "
            f"each: the cluster holds {room(plan, nodes)} ({there}); lower train.num_workers or "
            "train.cpus_per_worker"
        )
    return plan


def room(plan: WorkerPlan, nodes: Sequence[Resources]) -> int:
    """Return how many such workers the nodes hold."""
    return sum(node.room_for(plan.each) for node in nodes)


def _default_cpus(num_workers: int, nodes: Sequence[Resources], gpus: int) -> float:
    if gpus:
        per_gpu = min((n.num_cpus // n.num_gpus for n in nodes if n.num_gpus >= 1), default=1)
        return float(max(1, min(4, per_gpu)))
    largest = max((node.num_cpus for node in nodes), default=1)
    return float(max(1, min(largest, sum(node.num_cpus for node in nodes) // num_workers)))
