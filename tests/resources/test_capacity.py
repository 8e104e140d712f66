"""A stage does not count on what served replicas hold; tests/deploy has it on a real one."""

import logging

import pytest
import ray

from llava_ray.config.run import load_config
from llava_ray.errors import ResourceError
from llava_ray.resources import capacity
from llava_ray.resources.capacity import Fleet, NodeType, Resources, find_fleet, free_nodes


def test_without_an_application_all_is_free(ray_local: None) -> None:
    (node,), held = free_nodes()
    assert (node.num_cpus, node.num_gpus, held) == (2, 0, "") and node.memory_bytes > 0


def test_where_replicas_hold_all_a_stage_waits_and_is_told(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(capacity, "_taken_by_replicas", lambda: [(here, {"CPU": 1.5})])
    capacity._warn_of_waiting.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [node.num_cpus for node in free_nodes()[0]] == [2]
    assert "hold all CPUs" in caplog.text and "serve shutdown" in caplog.text


def test_what_replicas_hold_is_said_where_the_rest_is_too_little(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(capacity, "_taken_by_replicas", lambda: [(here, {"CPU": 1})])
    config = load_config(None, ["resources.node_types=up"])
    with pytest.raises(ResourceError, match="replicas hold 1 CPUs: 'serve shutdown -y'"):
        find_fleet(config).check("train", Resources(2))


def make_fleet(*types: NodeType, complete: bool = True, accelerator: str = "auto") -> Fleet:
    return Fleet(types, complete, accelerator)


def test_fewer_cpus_than_asked_for_are_enough() -> None:
    fleet = make_fleet(
        NodeType("small", Resources(2, memory_bytes=8e9), 4),
        NodeType("large", Resources(1, memory_bytes=16e9)),
    )
    assert fleet.fit("it", Resources(num_cpus=8, memory_bytes=5)).num_cpus == 2
    assert fleet.fit("it", Resources(num_cpus=8, memory_bytes=9e9)).num_cpus == 1
    fleet.check("it", Resources(2, memory_bytes=8e9), 4)
    with pytest.raises(ResourceError, match=r"it asks for 5 times 2 CPUs.* has room for 4"):
        fleet.check("it", Resources(2, memory_bytes=8e9), 5)
    with pytest.raises(ResourceError, match=r"has no node for that; it has 4 small of 2 CPUs"):
        fleet.fit("it", Resources(2, memory_bytes=17e9))


def test_what_may_still_come_is_not_refused() -> None:
    unknown = make_fleet(NodeType("node", Resources(2)), complete=False, accelerator="gpu")
    need = Resources(4, num_gpus=1)
    assert unknown.gpu and unknown.fit("it", need) == need
    unknown.check("it", need, 8)


def test_an_accelerator_that_cannot_come_is_refused() -> None:
    assert make_fleet(NodeType("node", Resources(2, 1))).gpu
    assert not make_fleet(NodeType("node", Resources(2, 1)), accelerator="cpu").gpu
    with pytest.raises(ResourceError, match=r"no GPU in 1 node of 2 CPUs"):
        _ = make_fleet(NodeType("node", Resources(2)), accelerator="gpu").gpu
