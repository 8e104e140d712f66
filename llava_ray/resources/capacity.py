"""What a stage's work asks for, and what the nodes that a cluster has or can have offer."""

import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from llava_ray.config.run import RunConfig, ServeConfig
from llava_ray.errors import ResourceError
from llava_ray.resources.devices import device_name

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


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind."""

    name: str
    each: Resources
    """What a node has; no memory where nobody said how much."""
    max_count: int = 1

    def __str__(self) -> str:
        return f"{self.max_count} {self.name} of {self.each}"

    def room_for(self, need: Resources) -> int:
        """Return how often a need fits on one node; memory counts where it is known."""
        memory_bytes = need.memory_bytes if self.each.memory_bytes else 0
        return self.each.room_for(replace(need, memory_bytes=memory_bytes))


@dataclass(frozen=True)
class Fleet:
    """The nodes that work is planned for, whether they are up or not."""

    types: tuple[NodeType, ...]
    complete: bool
    """Whether no node of another kind can come; what fits none is then refused at once."""
    accelerator: str
    """As resources.accelerator."""
    held: str = ""
    """What is not counted in, since served replicas have it."""

    @property
    def gpu(self) -> bool:
        """Whether what can use a GPU asks for one.

        Raises ResourceError where GPUs are wanted and none can come.
        """
        there = any(node.each.num_gpus >= 1 for node in self.types)
        if self.accelerator == "gpu" and self.complete and not there:
            raise ResourceError(f"resources.accelerator=gpu: no GPU in {self}; add one or use cpu")
        return there if self.accelerator == "auto" else self.accelerator == "gpu"

    def __str__(self) -> str:
        return ", ".join(map(str, self.types)) or "no nodes"

    def total(self, need: Resources) -> int:
        """Return how often a need fits on all nodes together."""
        return sum(node.room_for(need) * node.max_count for node in self.types)

    def check(self, what: str, need: Resources, count: int = 1) -> None:
        """Raise ResourceError where the nodes can never hold a need so often."""
        if self.complete and (room := self.total(need)) < count:
            times = f"{count} times " if count > 1 else ""
            has = f"has room for {room}" if room else "has no node for that"
            held = self.held and f"; {self.held}: 'serve shutdown -y' ends what is served"
            raise ResourceError(
                f"{what} asks for {times}{need}: the cluster {has}; it has {self}{held}"
            )

    def gpus_per_replica(self, serve: ServeConfig) -> float:
        """Return the GPUs of one replica of the endpoint, whose variants share them."""
        if serve.gpus_per_replica is not None or not self.gpu:
            return serve.gpus_per_replica or 0.0
        there = sum(node.each.num_gpus * node.max_count for node in self.types)
        return min(1.0, there / serve.min_replicas) if self.complete else 1.0

    def check_replicas(self, serve: ServeConfig, count: int) -> None:
        """Raise ResourceError when the cluster can never hold so many replicas."""
        self.check("serve", Resources(serve.cpus_per_replica, self.gpus_per_replica(serve)), count)

    def fit(self, what: str, need: Resources) -> Resources:
        """Lower the CPUs to what the largest fitting node has: fewer CPUs only take longer.

        Raises ResourceError where no node can hold it.
        """
        least = replace(need, num_cpus=min(1, need.num_cpus))
        fitting = [node.each.num_cpus for node in self.types if node.room_for(least)]
        if not fitting:
            self.check(what, need)
            return need
        return replace(need, num_cpus=min(need.num_cpus, max(fitting)))


def find_fleet(config: RunConfig, *, idle: bool = False) -> Fleet:
    """Return the nodes that resources.node_types names, else those of the connected cluster.

    idle: what served replicas hold of them is counted in.
    """
    wanted = config.resources
    if not isinstance(wanted.node_types, tuple):
        free, held = free_nodes(idle=idle)
        nodes = tuple(NodeType("node", each, count) for each, count in Counter(free).items())
        return Fleet(nodes, wanted.node_types == "up", wanted.accelerator, held)
    types = (
        NodeType(t.name, Resources(t.num_cpus, t.num_gpus, t.memory_bytes), t.max_count)
        for t in wanted.node_types
    )
    return Fleet(tuple(types), True, wanted.accelerator)


def free_nodes(*, idle: bool = False) -> tuple[list[Resources], str]:
    """Return what each living machine has without what served replicas have, unless it counts as
    idle, and in words what those have.

    Replicas stay: a stage that counted on their CPUs would wait for them forever. What other jobs
    have comes free, so it is counted in. Where replicas have all CPUs or GPUs that there are, they
    are counted in too: a stage then waits, and a warning says why.
    """
    import ray

    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    totals = {node["NodeID"]: node["Resources"] for node in alive if node["Alive"]}
    free = {id: {key: has.get(key, 0.0) for key in _COUNTED} for id, has in totals.items()}
    held = dict.fromkeys(_COUNTED, 0.0)
    for node_id, taken in () if idle else _taken_by_replicas():
        if node_id in free:
            for key in _COUNTED:
                free[node_id][key] -= taken.get(key, 0.0)
                held[key] += taken.get(key, 0.0)
    for key in ("CPU", "GPU"):
        most = max((has.get(key, 0.0) for has in totals.values()), default=0.0)
        if most >= 1 and all(node[key] < 1 for node in free.values()):
            _warn_of_waiting(key)
            for node_id, node in free.items():
                node[key] = totals[node_id].get(key, 0.0)
    words = f"replicas hold {Resources(*held.values())}" if any(held.values()) else ""
    return [Resources(*(node[key] for key in _COUNTED)) for node in free.values()], words


def model_up(*, gpu: bool) -> str:
    """Return a part of the name of the GPU that every living node has, or of the only node's
    processor; empty where they differ or it is unknown."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if not gpu:
        # The driver runs on a node of its cluster.
        return device_name("cpu") if len(alive) == 1 else ""
    prefix = "accelerator_type:"
    types = {key for node in alive for key in node["Resources"] if key.startswith(prefix)}
    return types.pop().removeprefix(prefix) if len(types) == 1 else ""


@functools.cache
def _warn_of_waiting(key: str) -> None:
    """Warn once in a process."""
    logger.warning(
        "served replicas hold all %ss: this waits for more; 'serve shutdown -y' ends them", key
    )


def _taken_by_replicas() -> Iterator[tuple[str | None, dict[str, float]]]:
    """Yield the resources of each replica of Ray Serve, and its node where it has one."""
    for application in serve_details().get("applications", {}).values():
        for deployment in application["deployments"].values():
            options = deployment["deployment_config"]["ray_actor_options"]
            resources = {
                "CPU": float(options.get("num_cpus") or 0),
                "GPU": float(options.get("num_gpus") or 0),
                "memory": float(options.get("memory") or 0),
            }
            for replica in deployment["replicas"]:
                yield replica["node_id"], resources


def serve_details() -> dict[str, Any]:
    """Return what the dashboard says of Ray Serve (`GET /api/serve/applications/`), or nothing."""
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
        return {}
    try:
        return dict(ServeSubmissionClient(f"http://{dashboard}").get_serve_details())
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # In a worker of a cluster without a dashboard the address may be another cluster's.
        logger.warning("what Ray Serve holds is unknown: %s", str(error).splitlines()[0])
        return {}
