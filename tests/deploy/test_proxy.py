"""What a cluster that serves through HAProxy takes for itself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from free_port import free_port

from llava_ray.config.run import ServeConfig
from llava_ray.deploy import proxy
from llava_ray.errors import ConfigError

HERE = Path(__file__).parent


def test_replicas_that_haproxy_cannot_reach_are_refused(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True}, {"Alive": True}, {"Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    config = ServeConfig(proxy="haproxy")
    with pytest.raises(ConfigError, match=r"out of reach on the other 1 nodes.*serve.host=0.0.0.0"):
        proxy.start(config)


def test_ports_of_a_range_are_free_and_whole_ranges_apart() -> None:
    import socket

    first = proxy._free_range()
    with socket.create_server(("127.0.0.1", first[40])):
        others = {proxy._free_range()[0] for _ in range(20)}
    assert first[0] not in others
    assert all(other % 100 == first[0] % 100 for other in others)


@contextmanager
def _cluster(folder: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a Ray of its own that serves through HAProxy and does what its stdin says."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, str(HERE / "cluster_of_its_own.py"), str(folder), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            _await(process, "serves")
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _await(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended before it said {word!r}")


def _tell(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


@pytest.mark.slow
@pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1")
def test_no_answer_ever_comes_from_another_cluster_of_the_machine(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    with ExitStack() as stack:
        first = stack.enter_context(_cluster(tmp_path / "a", ports[0]))
        second = stack.enter_context(_cluster(tmp_path / "b", ports[1]))
        url = f"http://127.0.0.1:{ports[0]}/v1/models"
        ours, theirs = (
            httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["deployment"]
            for port in ports
        )
        assert ours != theirs
        _tell(second, "scale up")
        _tell(first, "kill the replica")
        answers: list[object] = []
        start = time.monotonic()
        while time.monotonic() - start < 20 or answers[-1] != ours:
            assert time.monotonic() - start < 120, "the replica comes back"
            try:
                answer = httpx.get(url, timeout=5)
                answers.append(
                    json.loads(answer.text)["data"][0]["deployment"]
                    if answer.status_code == 200
                    else answer.status_code
                )
            except httpx.HTTPError as error:
                answers.append(type(error).__name__)
            time.sleep(0.05)
    print({answer: answers.count(answer) for answer in set(answers)})
    assert theirs not in answers
