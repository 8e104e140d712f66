"""What a config leaves open is settled by the nodes that its cluster can have, up or not."""

from pathlib import Path

import pytest

from llava_ray.config.run import RunConfig, load_config
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import Fleet, NodeType, Resources, find_fleet
from llava_ray.settle import settle, shortages, with_node_types

REPO = Path(__file__).parents[1]
LARGE = "model.path=llava-hf/llava-1.5-7b-hf"
GPUS = Fleet((NodeType("gpu", Resources(12, 1, 9e11), 8),), True, "auto")
CPUS = Fleet((NodeType("cpu", Resources(16, 0, 9e11), 4),), True, "auto")
NOBODY_SAID = Fleet((), False, "auto")


def settled(config: RunConfig) -> tuple[str, int | None, str, str, float | None]:
    return (
        config.resources.accelerator, config.train.num_workers, config.train.precision,
        config.benchmark.device, config.serve.gpus_per_replica,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fleet", "overrides", "expected"),
    [
        (GPUS, [LARGE], ("gpu", 8, "bf16", "cuda", 1)),
        (GPUS, [LARGE, "train.num_workers=2"], ("gpu", 2, "bf16", "cuda", 1)),
        (GPUS, ["resources.accelerator=cpu"], ("cpu", 1, "fp32", "cpu", 0)),
        (CPUS, [], ("cpu", 1, "fp32", "cpu", 0)),
        (NOBODY_SAID, [], ("cpu", 1, "fp32", "cpu", 0)),
        # B1: a 7B waits for a GPU, and does not fall to the CPUs that are up.
        (NOBODY_SAID, [LARGE], ("gpu", 1, "bf16", "cuda", 1)),
        (Fleet(CPUS.types, False, "auto"), [LARGE], ("gpu", 1, "bf16", "cuda", 1)),
    ],
)
def test_nothing_is_left_open(
    fleet: Fleet, overrides: list[str], expected: tuple[object, ...]
) -> None:
    once = settle(load_config(None, overrides), fleet)
    assert settled(once) == expected
    assert settle(once, fleet) == once


def test_a_large_model_goes_to_cpus_only_when_that_is_said() -> None:
    with pytest.raises(
        ResourceError, match=r"is large and the cluster has no GPU.*accelerator=cpu"
    ):
        settle(load_config(None, [LARGE]), CPUS)
    config = load_config(None, [LARGE, "resources.accelerator=cpu"])
    assert settled(settle(config, CPUS))[0] == "cpu"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aws.yaml", [(16, 0, 6e10, 4), (16, 1, 2.4e11, 8)]),
        ("gcp.yaml", [(16, 0, 6e10, 4), (12, 1, 1.6e11, 8)]),
        ("kuberay/raycluster.yaml", [(14, 0, 56 * 2**30, 4), (10, 1, 140 * 2**30, 8)]),
    ],
)
def test_node_types_come_from_every_kind_of_cluster_yaml(
    name: str, expected: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups on spot and on demand stand for the same nodes."""
    path = str(REPO / "cluster" / name)
    said = with_node_types(load_config(None, [f"resources.node_types={path}"]))
    monkeypatch.setenv("LLAVA_RAY_NODE_TYPES", path)
    assert with_node_types(load_config(None, [])) == said
    found = find_fleet(said)
    assert found.complete
    assert [
        (n.each.num_cpus, n.each.num_gpus, n.each.memory_bytes, n.max_count) for n in found.types
    ] == expected


def test_who_says_nothing_is_taken_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_RAY_NODE_TYPES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert with_node_types(load_config(None, [])).resources.node_types == "up"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert with_node_types(load_config(None, [])).resources.node_types is None
    with pytest.raises(ConfigError, match="no cluster YAML at nowhere.yaml"):
        with_node_types(load_config(None, ["resources.node_types=nowhere.yaml"]))


def test_every_shortage_is_named() -> None:
    config = load_config(None, ["train.num_workers=9", "serve.max_replicas=20"])
    train, serve = shortages(config, GPUS)
    assert train.startswith("nothing can train here: train.num_workers=9")
    assert serve.startswith("serve asks for 20 times 1 CPUs, 1 GPUs: the cluster has room for 8")


def test_a_request_never_mixes_two_kinds_of_nodes() -> None:
    """B2: what one kind has in CPUs and memory and another in GPUs fits nowhere together."""
    from llava_ray.merge import merge_resources

    cpus = NodeType("cpu", Resources(16, 0, 56 * 2**30), 4)
    gpus = NodeType("gpu", Resources(4, 1, 14 * 2**30), 4)
    fleet = Fleet((cpus, gpus), True, "gpu")
    assert merge_resources(2 * 10**9, fleet) == Resources(2, 1, 5 * 10**9)
    large = merge_resources(14 * 10**9, fleet)
    assert large == Resources(8, 0, 35 * 10**9) and cpus.room_for(large)
