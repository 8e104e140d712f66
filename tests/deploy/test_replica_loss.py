"""A replica is killed while it answers: what had begun ends in an error, the rest goes on."""

import json
import os
import signal
import threading
import time

import openai
import pytest
from free_port import free_port
from openai import OpenAI
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.config import RunConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]

CLIENTS = 6


def _engine_pids() -> list[int]:
    import psutil

    return sorted(
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica:llava_ray:engine" in " ".join(process.cmdline())
    )


class Asker(threading.Thread):
    """Ask for streams until told to stop; remember how each ended."""

    def __init__(self, url: str, over: threading.Event, number: int) -> None:
        super().__init__()
        self.url, self.over, self.number = url, over, number
        self.whole = 0
        self.cut: list[str] = []
        self.lost: list[BaseException] = []

    def run(self) -> None:
        with OpenAI(base_url=self.url, api_key="unused", max_retries=0) as client:
            while not self.over.is_set():
                self._ask(client)

    def _ask(self, client: OpenAI) -> None:
        begun = False
        try:
            stream = client.chat.completions.create(
                model="none-fp32",
                messages=[{"role": "user", "content": f"What is sign {self.number}?"}],
                max_tokens=40,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                begun = begun or bool(chunk.choices[0].delta.content)
                reason = chunk.choices[0].finish_reason
            assert reason == "length"
            self.whole += 1
        except openai.APIStatusError as error:
            self.lost.append(error)
        except openai.APIError as error:
            # The client raises this for an error event; a broken connection is another class.
            if begun and type(error) is openai.APIError and error.code == "engine_lost":
                self.cut.append(str(error))
            else:
                self.lost.append(error)
        except Exception as error:
            self.lost.append(error)


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
        victims = _engine_pids()
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        time.sleep(45)
    finally:
        over.set()
        for asker in askers:
            asker.join()
        replaced = _engine_pids()
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
