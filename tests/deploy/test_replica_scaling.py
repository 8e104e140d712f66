"""Replicas come under load, and the second one shares the work."""

import os
import time

import httpx
import pytest
from askers import asking, engine_pids, ways
from free_port import free_port
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.config.run import RunConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]

# Serve waits half a minute before it believes in a load; then the replica has to start.
_PATIENCE_S = 150


def _replicas_that_answered(url: str) -> set[str]:
    text = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=30).text
    name = "ray_llava_ray_generated_tokens_total{"
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name)]
    return {labels for labels, value in lines if float(value) > 0}


@pytest.mark.parametrize("proxy", ["python", "haproxy"])
def test_requests_that_wait_bring_a_second_replica_that_shares_them(
    ray_local: None, tmp_path: object, proxy: str
) -> None:
    from ray import serve

    config = RunConfig.model_validate(
        {
            "storage": {"uri": str(tmp_path)},
            "serve": {
                "port": free_port(),
                "proxy": proxy,
                "cpus_per_replica": 0.25,
                "min_replicas": 1,
                "max_replicas": 2,
                "max_concurrent_requests": 1,
                "context": 512,
            },
        }
    )
    record = deploy.run(config, make_chosen(config))
    try:
        assert len(engine_pids()) == 1
        before = _replicas_that_answered(record.url)
        with asking(record.url, 4) as askers:
            start = time.monotonic()
            while len(_replicas_that_answered(record.url) - before) < 2:
                assert time.monotonic() - start < _PATIENCE_S, f"{len(engine_pids())} replicas"
                health = time.monotonic()
                assert httpx.get(record.url.removesuffix("/v1") + "/health").status_code == 200
                assert time.monotonic() - health < 2, "health waits behind no chat"
                time.sleep(1)
            print(f"{proxy}: the second replica answered after {time.monotonic() - start:.0f} s")
    finally:
        serve.shutdown()
    assert set(ways(askers)) == {"whole"}
