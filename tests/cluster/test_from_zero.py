"""The whole line on a cluster of which nothing but a head without CPUs is up (B1)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_cluster import REPO, fake_cluster
from test_local_cluster import free_ports

from llava_ray.cluster.local import Head

COMES_AFTER_S = 75.0
"""Above the minute that Ray Train gives its workers by default."""
_GONE_S = 120.0

_COUNT = "import ray; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"


def arguments(folder: Path, port: int) -> list[str]:
    return [
        f"storage.uri={folder / 'runs'}", "data.source=scene-text", "data.limit=24",
        "train.max_steps=2", "train.lora_r=4", "train.trackers=[]", "merge.probe_samples=1",
        "quantize.variants=[none-fp16, gguf-q8_0]", "benchmark.fidelity_samples=1",
        "benchmark.caption_samples=1", "benchmark.shown_samples=1", "benchmark.repeats=1",
        "benchmark.warmup=0", "benchmark.max_new_tokens=8", "benchmark.decode_tokens=4",
        "choose.max_kl_divergence=null", "serve.context=512", f"serve.port={port}",
        "serve.max_concurrent_requests=2",
    ]  # fmt: skip


class Driver:
    """Commands beside the cluster, as a person would give them."""

    def __init__(self, head: Head) -> None:
        self._environment = {**os.environ, **head.environment(), "PYTHONPATH": str(REPO)}
        self._environment.pop("RAY_AUTH_TOKEN", None)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=self._environment, cwd=REPO, timeout=600,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to a file."""
        with log.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, *command], env=self._environment, cwd=REPO,
                stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def alive(self) -> int:
        return int(self.run("-c", _COUNT).split()[0])


@contextmanager
def counted_nodes(driver: Driver) -> Iterator[list[int]]:
    counts = [driver.alive()]
    yield counts
    counts.append(driver.alive())


def test_from_zero_nodes_come_the_line_runs_and_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    *_, port = free_ports(4)  # The cluster takes the first three, one of them late.
    with fake_cluster(
        tmp_path, workers=1, cpus=2, comes_after_s=COMES_AFTER_S, idle_minutes=0.4
    ) as head:
        driver = Driver(head)
        with counted_nodes(driver) as counts:
            start = time.monotonic()
            said = driver.run("jobs/pipeline.py", *arguments(tmp_path, port))
        assert counts == [1, 2]
        assert time.monotonic() - start > COMES_AFTER_S
        assert "train: asks for 1 worker(s) with 2 CPUs each" in said
        (ask,) = (line for line in said.splitlines() if line.startswith("ask it:"))
        answer = subprocess.run(
            ["bash", "-c", ask.removeprefix("ask it:")], capture_output=True, timeout=60, check=True
        )
        assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
        driver.run("-m", "ray.serve.scripts", "shutdown", "-y")
        deadline = time.monotonic() + _GONE_S
        while driver.alive() > 1:
            assert time.monotonic() < deadline, "the node stays"
            time.sleep(2)
        with counted_nodes(driver) as counts:
            said = driver.run("jobs/choose.py", *arguments(tmp_path, port))
        assert counts == [1, 1]
        assert "is there already" in said and "asks for" not in said
