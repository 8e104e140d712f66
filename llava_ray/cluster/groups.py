"""Node groups of a cluster YAML: what a node of each has, how many there can be, on what market."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llava_ray.cluster.schema import read_cluster, read_documents
from llava_ray.config.run import NodeTypeConfig
from llava_ray.errors import ConfigError
from llava_ray.resources.capacity import NodeType, Resources

Tree = dict[str, Any]

_UNITS = {
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
}  # fmt: skip


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind."""

    type: NodeType
    min_count: int
    priority: int
    spot: bool


@dataclass(frozen=True)
class Cluster:
    """A cluster YAML, of Ray's launcher or of KubeRay."""

    tree: Tree
    spec: Tree | None
    """The RayCluster's spec, for KubeRay."""
    head: NodeGroup | None
    """None where Ray finds out by itself what the head has (provider local)."""
    workers: tuple[NodeGroup, ...]


def read_groups(path: Path) -> Cluster:
    """Read the node groups of a cluster YAML.

    Raises ConfigError for a file that is neither Ray's launcher's nor KubeRay's, or lacks a part.
    """
    try:
        return _read_groups(path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{path}: no cluster YAML that can be followed ({reason})") from error


def _read_groups(path: Path) -> Cluster:
    objects = [d for d in read_documents(path) if isinstance(d, dict) and "apiVersion" in d]
    if objects:
        of_ray = (d for d in objects if str(d["apiVersion"]).startswith("ray.io/"))
        if (tree := next(of_ray, None)) is None:
            raise ConfigError(f"{path}: Kubernetes objects, but none of ray.io")
        spec = ray_cluster_spec(tree)
        groups = [_pod_group(group) for group in spec.get("workerGroupSpecs") or ()]
        head = _pod_group({"groupName": "head", **spec["headGroupSpec"]})
        return Cluster(tree, spec, head, tuple(groups))
    tree = read_cluster(path)
    if tree["provider"]["type"] == "local":
        return Cluster(tree, None, None, ())
    types = tree.get("available_node_types") or {}
    head_name = str(tree.get("head_node_type"))
    if head_name not in types:
        raise ConfigError(
            f"{path}: head_node_type {head_name!r} is not among {', '.join(types) or 'no types'}"
        )
    max_workers = int(tree.get("max_workers", 0))
    groups = [
        _node_group(name, node, max_workers) for name, node in types.items() if name != head_name
    ]
    head = _node_group(head_name, types[head_name], 1)
    return Cluster(tree, None, head, tuple(groups))


def node_types(cluster: Cluster) -> Literal["up"] | tuple[NodeTypeConfig, ...]:
    """Return the kinds of workers as resources.node_types has them; `up` where no others can come.

    Groups whose nodes have the same, on spot and on demand, stand for the same nodes.
    """
    if cluster.head is None:
        return "up"
    most: dict[Resources, NodeType] = {}
    for group in sorted(cluster.workers, key=lambda group: group.type.max_count):
        most[group.type.each] = group.type
    return tuple(
        NodeTypeConfig(name=found.name, max_count=found.max_count, **asdict(each))
        for each, found in most.items()
        if found.max_count
    )


def ray_cluster_spec(tree: Tree) -> Tree:
    """Return the RayCluster spec inside a RayCluster, RayJob or RayService."""
    spec = tree["spec"]
    inner = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(tree["kind"])
    return dict(spec[inner] if inner else spec)


def _node_group(name: str, node: Tree, max_workers: int) -> NodeGroup:
    resources = node.get("resources") or {}
    return NodeGroup(
        NodeType(
            name,
            Resources(*(resources.get(key, 0) for key in ("CPU", "GPU", "memory"))),
            _count(min(node.get("max_workers", max_workers), max_workers)),
        ),
        min_count=node.get("min_workers", 0),
        priority=node.get("priority", 0),
        spot=_is_spot_instance(node.get("node_config") or {}),
    )


def _is_spot_instance(config: Tree) -> bool:
    scheduling = config.get("scheduling") or []
    parts = scheduling if isinstance(scheduling, list) else [scheduling]
    return (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot" or any(
        part.get("preemptible") or part.get("provisioningModel") == "SPOT" for part in parts
    )


def _pod_group(group: Tree) -> NodeGroup:
    pod = group["template"]["spec"]
    limits = (pod["containers"][0].get("resources") or {}).get("limits") or {}
    given = (group.get("rayStartParams") or {}).get("num-cpus")
    selector = pod.get("nodeSelector") or {}
    each = Resources(
        quantity(limits.get("cpu", 0)) if given is None else float(given),
        quantity(limits.get("nvidia.com/gpu", 0)),
        quantity(limits.get("memory", 0)),
    )
    return NodeGroup(
        NodeType(group["groupName"], each, _count(group.get("maxReplicas", 1))),
        min_count=group.get("minReplicas", 1),
        priority=group.get("priority", 0),
        spot=any("spot" in f"{key}={value}".lower() for key, value in selector.items()),
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of nodes")
    return value


def quantity(value: str | float) -> float:
    """Read a Kubernetes quantity such as 140Gi or 250m."""
    text = str(value)
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return float(text[: -len(unit)]) * factor
    return float(text)


def strings_of(node: Any) -> Iterator[str]:
    """Yield every string inside a tree."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings_of(value)
