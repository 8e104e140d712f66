"""How many workers, with what each, and whether the cluster can ever hold them."""

from dataclasses import dataclass

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.resources.capacity import Fleet, Resources


@dataclass(frozen=True)
class WorkerPlan:
    """What the training asks of the cluster."""

    num_workers: int
    each: Resources

    def resources(self) -> dict[str, float]:
        """Return one worker's resources as Ray Train names them."""
        gpus = {"GPU": self.each.num_gpus} if self.each.num_gpus else {}
        return {"CPU": self.each.num_cpus, **gpus}


def plan_workers(train: TrainConfig, fleet: Fleet) -> WorkerPlan:
    """Choose workers for the nodes that a cluster can have.

    Raises ResourceError when it could not hold them even if it were idle, and ConfigError when a
    precision needs GPUs that are not there.
    """
    num_workers = train.num_workers or default_workers(fleet)
    if train.precision == "fp16" and not fleet.gpu:
        raise ConfigError("train.precision='fp16' needs GPUs, and the cluster has none: use fp32")
    each = Resources(train.cpus_per_worker or _default_cpus(num_workers, fleet), int(fleet.gpu))
    what = f"train.num_workers={num_workers} (with train.cpus_per_worker={each.num_cpus:g})"
    fleet.check(what, each, num_workers)
    return WorkerPlan(num_workers, each)


def default_workers(fleet: Fleet) -> int:
    """Return one worker for each GPU that can come, where that is known; else one."""
    if not fleet.gpu or not fleet.complete:
        return 1
    return max(1, int(sum(node.each.num_gpus * node.max_count for node in fleet.types)))


def _default_cpus(num_workers: int, fleet: Fleet) -> float:
    if fleet.gpu:
        with_gpus = (node.each for node in fleet.types if node.each.num_gpus >= 1)
        per_gpu = min((each.num_cpus // each.num_gpus for each in with_gpus), default=1)
        return float(max(1, min(4, per_gpu)))
    largest = max((node.each.num_cpus for node in fleet.types), default=1)
    total = sum(node.each.num_cpus * node.max_count for node in fleet.types)
    return float(max(1, min(largest, total // num_workers)))
