"""A stage does not count on what served replicas hold; tests/deploy has it on a real one."""

import logging

import pytest
import ray

from llava_ray.resources import capacity
from llava_ray.resources.capacity import Resources, free_nodes


def test_without_an_application_all_is_free(ray_local: None) -> None:
    (node,) = free_nodes()
    assert (node.num_cpus, node.num_gpus) == (2, 0) and node.memory_bytes > 0


def test_where_replicas_hold_all_a_stage_waits_and_is_told(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(capacity, "_taken_by_replicas", lambda: [(here, {"CPU": 1.5})])
    capacity._warn_of_waiting.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [node.num_cpus for node in free_nodes()] == [2]
    assert "hold all CPUs" in caplog.text and "serve shutdown" in caplog.text


def test_fewer_cpus_than_asked_for_are_enough() -> None:
    nodes = [Resources(2, memory_bytes=8e9), Resources(1, memory_bytes=16e9)]
    assert Resources(num_cpus=8, memory_bytes=5).fitted(nodes).num_cpus == 2
    assert Resources(num_cpus=2, memory_bytes=int(8e9)).shortage(nodes) is None
    lack = Resources(num_cpus=2, memory_bytes=int(9e9)).shortage(nodes)
    assert lack is not None and "the largest has 1 CPUs, 14.9 GiB of memory" in lack
