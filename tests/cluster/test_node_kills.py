"""A node is lost in the middle of a stage: another one comes, and the line goes on (B1).

By default in training; with LLAVA_RAY_SLOW=1 one line loses its node in every stage that asks for
one, and writes jobs/results/node_kills.json.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from fake_cluster import fake_cluster
from test_from_zero import Driver, arguments
from test_local_cluster import free_ports

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.artifacts.store import ArtifactStore, verify
from llava_ray.bench.results import write

WORK = {
    "sweep": "ray::RayTrainWorker",
    "train": "ray::RayTrainWorker",
    "merge": "ray::merge",
    "quantize": "ray::gguf-q8_0",
    "benchmark": "ray::measure",
    "deploy": "ray::ServeReplica",
}
"""By stage, how the title of its process begins. prepare and choose run on the head."""
RESULTS = Path(__file__).parents[2] / "jobs" / "results" / "node_kills.json"
COMES_AFTER_S = 5.0
_WAIT_S = 300.0
SLOW = pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1")
T = TypeVar("T")


def nodes(folder: Path) -> Iterator[psutil.Process]:
    """Yield the raylets of the cluster whose cache is in a folder, but the head's."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if (
                command
                and command[0].endswith("/raylet")
                and "--head" not in command
                and process.environ().get("LLAVA_RAY_CACHE") == str(folder / "cache")
            ):
                yield process


def at_work(folder: Path, title: str) -> psutil.Process | None:
    """Return the node that has a process of such a title."""
    for node in nodes(folder):
        for process in node.children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    return node
    return None


def awaited(look: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + _WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


def strike(folder: Path, stage: str, log: Path) -> dict[str, object]:
    """Kill the node that works for a stage, and wait until another does."""
    awaited(lambda: f"{stage}: starts" in log.read_text())
    node = awaited(lambda: at_work(folder, WORK[stage]))
    for process in [node, *node.children(recursive=True)]:
        process.kill()
    start = time.monotonic()
    other = awaited(lambda: at_work(folder, WORK[stage]))
    assert other != node
    again_s = round(time.monotonic() - start, 1)
    return {"stage": stage, "work": WORK[stage], "again_after_s": again_s}


@pytest.mark.parametrize(
    ("job", "stages"),
    [
        ("train", ["train"]),
        pytest.param("pipeline", list(WORK), marks=[pytest.mark.slow, SLOW]),
    ],
)
def test_a_lost_node_is_replaced_and_the_line_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, stages: list[str]
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    *_, port = free_ports(4)  # The cluster takes the first three.
    settings = [*arguments(tmp_path, port), "train.max_steps=8", "train.checkpoint_every_steps=1"]
    if "sweep" in stages:
        settings += ["sweep.space={learning_rate: {grid: [1e-4, 3e-4]}}", "sweep.scheduler=fifo"]
    with fake_cluster(
        tmp_path, workers=1, cpus=2, comes_after_s=COMES_AFTER_S, idle_minutes=2
    ) as head:
        log, start = tmp_path / "log", time.monotonic()
        process = Driver(head).start(f"jobs/{job}.py", *settings, log=log)
        try:
            kills = [strike(tmp_path, stage, log) for stage in stages]
            assert process.wait(_WAIT_S) == 0, log.read_text()[-4000:]
        finally:
            process.kill()
        wall_s = round(time.monotonic() - start, 1)
    store = ArtifactStore(str(tmp_path / "runs"))
    for record in store.everything():
        verify(record, Path(record.uri))
    if job == "pipeline":
        assert len(store.find_all(Variant)) == len(store.find_all(Scorecard)) == 2
        command = "LLAVA_RAY_SLOW=1 python -m pytest -n 0 tests/cluster/test_node_kills.py"
        tree = {"command": command, "node_comes_after_s": COMES_AFTER_S, "pipeline_s": wall_s}
        tree["kills"] = kills
        write(RESULTS, "node_kills", tree)


def test_a_node_was_killed_in_every_stage_that_has_one() -> None:
    tree = json.loads(RESULTS.read_text())
    assert [row["stage"] for row in tree["kills"]] == list(WORK)
