"""What replicas ask of the cluster."""

from llava_ray.config.run import ServeConfig
from llava_ray.resources.capacity import Fleet, Resources


def gpus_per_replica(serve: ServeConfig, fleet: Fleet) -> float:
    """Return the GPUs of one replica, whose variants share them."""
    if serve.gpus_per_replica is not None or not fleet.gpu:
        return serve.gpus_per_replica or 0.0
    there = sum(node.each.num_gpus * node.max_count for node in fleet.types)
    return min(1.0, there / serve.min_replicas) if fleet.complete else 1.0


def check_room(serve: ServeConfig, fleet: Fleet, replicas: int) -> None:
    """Raise ResourceError when the cluster can never hold so many replicas."""
    fleet.check(
        "serve", Resources(serve.cpus_per_replica, gpus_per_replica(serve, fleet)), replicas
    )
