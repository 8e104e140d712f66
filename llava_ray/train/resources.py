"""How many workers, with what each, and whether the cluster can ever hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import free_nodes


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerPlan:
    """What the training asks of the cluster."""

    num_workers: int
    cpus: float
    gpus: int

    @property
    def device(self) -> str:
        """The kind of device that a worker computes on."""
        return "cuda" if self.gpus else "cpu"

    def resources(self) -> dict[str, float]:
        """Return one worker's resources as Ray names them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def cluster_nodes() -> list[Node]:
    """Return the living machines of the connected cluster, without what is served from them."""
    return [Node(node["CPU"], node["GPU"]) for node in free_nodes()]


def plan_workers(train: TrainConfig, nodes: Sequence[Node], *, spare_cpus: float = 0) -> WorkerPlan:
    """Choose workers for a cluster; `spare_cpus` are left to others.

    Raises ResourceError when the cluster could not hold them even if it were idle, and
    ConfigError when a precision needs GPUs that are not there.
    """
    total_gpus = int(sum(node.gpus for node in nodes))
    gpus = 1 if total_gpus else 0
    num_workers = train.num_workers or max(1, total_gpus)
    if train.precision == "fp16" and not gpus:
        raise ConfigError("train.precision='fp16' needs GPUs, and the cluster has none: use fp32")
    cpus = train.cpus_per_worker or _default_cpus(num_workers, nodes, gpus, spare_cpus)
    plan = WorkerPlan(num_workers, cpus, gpus)
    if room(plan, nodes) < num_workers:
        there = ", ".join(f"{n.cpus:g} CPUs + {n.gpus:g} GPUs" for n in nodes) or "nothing"
        raise ResourceError(
            f"train.num_workers={num_workers} with {cpus:g} CPUs and {gpus} GPUs each: the "
            f"cluster holds {room(plan, nodes)} ({there}); lower train.num_workers or "
            "train.cpus_per_worker"
        )
    return plan


def room(plan: WorkerPlan, nodes: Sequence[Node]) -> int:
    """Return how many such workers the machines hold."""
    return sum(_fits(plan, node) for node in nodes)


def _default_cpus(num_workers: int, nodes: Sequence[Node], gpus: int, spare: float) -> float:
    if gpus:
        per_gpu = min((n.cpus // n.gpus for n in nodes if n.gpus >= 1), default=1)
        return float(max(1, min(4, per_gpu)))
    free = sum(node.cpus for node in nodes) - spare
    largest = max((node.cpus for node in nodes), default=1)
    return float(max(1, min(largest, free // num_workers)))


def _fits(plan: WorkerPlan, node: Node) -> int:
    by_cpu = int(node.cpus / plan.cpus + 1e-6)
    return min(by_cpu, int(node.gpus)) if plan.gpus else by_cpu
