"""A stage does not count on what a served application holds."""

import logging
from collections.abc import Iterator

import pytest
import ray

from llava_ray import capacity
from llava_ray.capacity import free_nodes


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # With a dashboard, for the list of actors comes from there.
    ray.init(address="local", num_cpus=3, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
class Replica:
    """Holds CPUs as a served replica does."""

    def ready(self) -> bool:
        return True


def held(cpus: float, namespace: str) -> ray.actor.ActorHandle:
    options = {"num_cpus": cpus, "namespace": namespace, "name": f"{namespace}-{cpus}"}
    actor = Replica.options(**options).remote()
    ray.get(actor.ready.remote())
    return actor


def test_replicas_are_left_out_and_other_jobs_counted_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert [node["CPU"] for node in free_nodes()] == [3]
    other = held(0.5, "another")
    assert [node["CPU"] for node in free_nodes()] == [3]
    served = held(1, "serve")
    (node,) = free_nodes()
    assert node["CPU"] == 2 and node["GPU"] == 0 and node["memory"] > 0
    ray.kill(other)
    ray.kill(served)


def test_where_replicas_hold_all_a_stage_waits_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    capacity._tell_of_waiting.cache_clear()
    served = held(2.5, "serve")
    with caplog.at_level(logging.WARNING):
        assert [node["CPU"] for node in free_nodes()] == [3]
    assert "hold all CPUs" in caplog.text and "serve shutdown" in caplog.text
    ray.kill(served)
