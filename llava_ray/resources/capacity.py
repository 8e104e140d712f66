"""What a stage's work asks for, and what the machines of the connected cluster have."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)

_COUNTED = ("CPU", "GPU", "memory")


@dataclass(frozen=True)
class Resources:
    """What one task needs, in Ray's terms."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0

    def options(self) -> dict[str, float]:
        """Return them as the options of a Ray task."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "memory": self.memory_bytes}

    def fitted(self, nodes: Sequence[dict[str, float]]) -> "Resources":
        """Lower the CPUs to what the largest node has: fewer CPUs only take longer."""
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        return self if most < 1 else replace(self, num_cpus=min(self.num_cpus, most))

    def shortage(self, nodes: Sequence[dict[str, float]]) -> str | None:
        """Say what no node has enough of, or None where one could run the task."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory_bytes)}
        if any(all(node.get(key, 0) >= value for key, value in wanted.items()) for node in nodes):
            return None
        most = ("GPU", "memory", "CPU")
        largest = max(nodes, key=lambda node: [node.get(key, 0) for key in most])
        return (
            f"no node has {_text(wanted)}; the largest has {_text(largest)}: "
            "add a node or leave this out"
        )


def _text(values: dict[str, float]) -> str:
    memory = values.get("memory", 0) / 2**30
    cpus, gpus = values.get("CPU", 0), values.get("GPU", 0)
    return f"{cpus:g} CPUs, {gpus:g} GPUs and {memory:.1f} GiB of memory"


def free_nodes() -> list[dict[str, float]]:
    """Return what each living machine has without what served replicas hold, as Ray names it.

    Replicas stay: a stage that counted on their CPUs would wait for them forever. What other jobs
    hold comes free, so it is counted in. Where replicas hold all CPUs or GPUs there are, they are
    counted in too: a stage then waits, and a warning says why.
    """
    import ray

    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    totals = {node["NodeID"]: node["Resources"] for node in alive if node["Alive"]}
    nodes = {id: {key: has.get(key, 0.0) for key in _COUNTED} for id, has in totals.items()}
    for node_id, resources in _taken_by_replicas():
        if node_id in nodes:
            for key in _COUNTED:
                nodes[node_id][key] -= resources.get(key, 0.0)
    for key in ("CPU", "GPU"):
        there = max((has.get(key, 0.0) for has in totals.values()), default=0.0)
        if there >= 1 and all(node[key] < 1 for node in nodes.values()):
            _warn_of_waiting(key)
            for node_id, node in nodes.items():
                node[key] = totals[node_id].get(key, 0.0)
    return list(nodes.values())


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
