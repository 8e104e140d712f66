"""A replica is killed while it answers: what had begun ends in an error, the rest goes on."""

import json
import os
import signal
import threading
import time

import pytest
from askers import Asker, engine_pids
from free_port import free_port
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.config.run import RunConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]

CLIENTS = 6


def test_a_killed_replica_loses_no_request_that_had_not_begun(
    ray_local: None, tmp_path: object
) -> None:
    from ray import serve

    config = RunConfig.model_validate(
        {
            "storage": {"uri": str(tmp_path)},
            "serve": {
                "port": free_port(),
                "cpus_per_replica": 0.25,
                "min_replicas": 2,
                "max_replicas": 2,
                "max_concurrent_requests": 2,
                "context": 512,
            },
        }
    )
    record = deploy.run(config, make_chosen(config))
    over = threading.Event()
    askers = [Asker(record.url, over, number) for number in range(CLIENTS)]
    try:
        for asker in askers:
            asker.start()
        time.sleep(5)
        victims = engine_pids()
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        time.sleep(45)
    finally:
        over.set()
        for asker in askers:
            asker.join()
        replaced = engine_pids()
        serve.shutdown()
    outcome = {
        "whole": sum(a.whole for a in askers),
        "cut": [text for a in askers for text in a.cut],
        "lost": [repr(error) for a in askers for error in a.lost],
    }
    print(json.dumps(outcome))
    assert outcome["lost"] == []
    assert 1 <= len(outcome["cut"]) <= 2
    assert outcome["whole"] > 2 * CLIENTS
    assert victims[0] not in replaced and len(replaced) == 2
