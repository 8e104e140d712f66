"""A stage does not count on what served replicas hold; tests/deploy has it on a real one."""

import logging

import pytest
import ray

from llava_ray.resources import capacity
from llava_ray.resources.capacity import free_nodes


def test_without_an_application_all_is_free(ray_local: None) -> None:
    (node,) = free_nodes()
    assert (node["CPU"], node["GPU"]) == (2, 0) and node["memory"] > 0


def test_where_replicas_hold_all_a_stage_waits_and_is_told(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(capacity, "_held_by_replicas", lambda: [(here, {"CPU": 1.5})])
    capacity._tell_of_waiting.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [node["CPU"] for node in free_nodes()] == [2]
    assert "hold all CPUs" in caplog.text and "serve shutdown" in caplog.text
