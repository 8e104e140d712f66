"""What the machines of the connected cluster have for a stage's work."""

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

_COUNTED = ("CPU", "GPU", "memory")
_SERVE_NAMESPACE = "serve"


def free_nodes() -> list[dict[str, float]]:
    """Return what each living machine has without what served replicas hold, as Ray names it.

    Replicas stay: a stage that counted on their CPUs would wait for them forever. What other jobs
    hold comes free, so it is counted in. Where replicas hold all CPUs or GPUs there are, they are
    counted in too: a stage then waits, and a warning tells why.
    """
    import ray

    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    totals = {node["NodeID"]: node["Resources"] for node in alive if node["Alive"]}
    nodes = {id: {key: has.get(key, 0.0) for key in _COUNTED} for id, has in totals.items()}
    for node_id, resources in _held_by_replicas():
        if node_id in nodes:
            for key in _COUNTED:
                nodes[node_id][key] -= resources.get(key, 0.0)
    for key in ("CPU", "GPU"):
        there = max((has.get(key, 0.0) for has in totals.values()), default=0.0)
        if there >= 1 and all(node[key] < 1 for node in nodes.values()):
            _tell_of_waiting(key)
            for node_id, node in nodes.items():
                node[key] = totals[node_id].get(key, 0.0)
    return list(nodes.values())


@functools.cache
def _tell_of_waiting(key: str) -> None:
    """Warn once in a process."""
    logger.warning(
        "served replicas hold all %ss: this waits for more; 'serve shutdown -y' ends them", key
    )


def _held_by_replicas() -> list[tuple[str, dict[str, float]]]:
    """Return the node and the resources of each actor of Ray Serve."""
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    try:
        actors = list_actors(
            address=ray.get_runtime_context().gcs_address,
            filters=[("state", "=", "ALIVE"), ("ray_namespace", "=", _SERVE_NAMESPACE)],
            limit=10_000,
            detail=True,
        )
    except (RayStateApiException, OSError):
        # Without a dashboard there is no such list; a Ray like that is one of our own.
        return []
    return [
        (actor.node_id, {key: float(value) for key, value in actor.required_resources.items()})
        for actor in actors
        if actor.node_id and actor.required_resources
    ]
