"""What a stage's work asks for, and what the machines of the connected cluster have."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)

_COUNTED = ("CPU", "GPU", "memory")


@dataclass(frozen=True)
class Resources:
    """What a task needs, or what a node has."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: float = 0

    def __str__(self) -> str:
        parts = [f"{self.num_cpus:g} CPUs"]
        parts += [f"{self.num_gpus:g} GPUs"] if self.num_gpus else []
        parts += [f"{self.memory_bytes / 2**30:.1f} GiB of memory"] if self.memory_bytes else []
        return ", ".join(parts)

    def options(self) -> dict[str, float]:
        """Return them as the options of a Ray task."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "memory": self.memory_bytes}

    def room_for(self, need: "Resources") -> int:
        """Return how often a need, which is not nothing, fits on a node of these."""
        pairs = zip(astuple(self), astuple(need), strict=True)
        return min(int(has / wanted + 1e-6) for has, wanted in pairs if wanted)

    def fitted(self, nodes: Sequence["Resources"]) -> "Resources":
        """Lower the CPUs to what the largest node has: fewer CPUs only take longer."""
        most = max((node.num_cpus for node in nodes), default=0)
        return self if most < 1 else replace(self, num_cpus=min(self.num_cpus, most))

    def shortage(self, nodes: Sequence["Resources"]) -> str | None:
        """Say what no node has enough of, or None where one could run the task."""
        if any(node.room_for(self) for node in nodes):
            return None
        largest = max(nodes, key=lambda node: (node.num_gpus, node.memory_bytes, node.num_cpus))
        return f"no node has {self}; the largest has {largest}: add a node or leave this out"


def free_nodes() -> list[Resources]:
    """Return what each living machine has without what served replicas have.

    Replicas stay: a stage that counted on their CPUs would wait for them forever. What other jobs
    have comes free, so it is counted in. Where replicas have all CPUs or GPUs that there are, they
    are counted in too: a stage then waits, and a warning says why.
    """
    import ray

    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    totals = {node["NodeID"]: node["Resources"] for node in alive if node["Alive"]}
    free = {id: {key: has.get(key, 0.0) for key in _COUNTED} for id, has in totals.items()}
    for node_id, taken in _taken_by_replicas():
        if node_id in free:
            for key in _COUNTED:
                free[node_id][key] -= taken.get(key, 0.0)
    for key in ("CPU", "GPU"):
        most = max((has.get(key, 0.0) for has in totals.values()), default=0.0)
        if most >= 1 and all(node[key] < 1 for node in free.values()):
            _warn_of_waiting(key)
            for node_id, node in free.items():
                node[key] = totals[node_id].get(key, 0.0)
    return [Resources(*(node[key] for key in _COUNTED)) for node in free.values()]


@functools.cache
def _warn_of_waiting(key: str) -> None:
    """Warn once in a process."""
    logger.warning(
        "served replicas hold all %ss: this waits for more; 'serve shutdown -y' ends them", key
    )


def _taken_by_replicas() -> list[tuple[str, dict[str, float]]]:
    """Return the node and the resources of each replica of Ray Serve.

    By the dashboard (`GET /api/serve/applications/`); without one it is unknown.
    """
    import ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    # The address keeps Ray from looking for another cluster, which it would then connect to.
    connected = ray.init(
        address=ray.get_runtime_context().gcs_address,
        ignore_reinit_error=True,
        logging_level=logging.WARNING,
    )
    dashboard = connected.dashboard_url
    if not dashboard:
        return []
    try:
        details = ServeSubmissionClient(f"http://{dashboard}").get_serve_details()
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # In a worker of a cluster without a dashboard the address may be another cluster's.
        logger.warning("what served replicas hold is unknown: %s", str(error).splitlines()[0])
        return []
    found = []
    for application in details["applications"].values():
        for deployment in application["deployments"].values():
            options = deployment["deployment_config"]["ray_actor_options"]
            resources = {
                "CPU": float(options.get("num_cpus") or 0),
                "GPU": float(options.get("num_gpus") or 0),
                "memory": float(options.get("memory") or 0),
            }
            found += [
                (replica["node_id"], resources)
                for replica in deployment["replicas"]
                if replica["node_id"]
            ]
    return found
