"""Jobs through the job API: ids, status, logs, the reason of a failure, stop and go on."""

import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_local_cluster import LOCAL, PORT_VARIABLES, free_ports
from tiny_run import small_model

from llava_ray.cluster.local import Head, down, up

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(REPO))
        for name, port in zip(PORT_VARIABLES, free_ports(3), strict=True):
            patch.setenv(name, str(port))
        try:
            yield up(LOCAL)
        finally:
            down(LOCAL)


def api(head: Head, path: str = "", body: dict[str, Any] | None = None, method: str = "GET") -> Any:
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {Path(head.token_path).read_text()}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        return json.load(response)


def submit(head: Head, job: str, script: str, *arguments: str) -> None:
    command = [sys.executable, str(REPO / "jobs" / script), *arguments]
    told = api(head, "", {"entrypoint": " ".join(command), "submission_id": job}, "POST")
    assert told["submission_id"] == job


def wait_for(ready: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ended(head: Head, job: str, timeout_s: float = 120) -> str:
    over = ("SUCCEEDED", "FAILED", "STOPPED")
    wait_for(lambda: api(head, job)["status"] in over, timeout_s)
    return str(api(head, job)["status"])


def log_lines(head: Head, job: str) -> list[str]:
    return [line for line in api(head, f"{job}/logs")["logs"].splitlines() if line.strip()]


def test_a_job_that_fails_says_why_in_its_last_line(head: Head, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    submit(head, "fails", "prepare.py", f"storage.uri={tmp_path}", f"data.source={gone}")
    assert ended(head, "fails") == "FAILED"
    last = log_lines(head, "fails")[-1]
    assert last.startswith("error: ") and str(gone) in last
    told = api(head, "fails")
    assert told["driver_exit_code"] == 2
    assert last in told["message"]


@pytest.mark.slow
@pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="trains twice: LLAVA_RAY_SLOW=1")
def test_a_stopped_job_goes_on_from_its_checkpoint_when_submitted_again(
    head: Head, tmp_path: Path
) -> None:
    captions = REPO / "tests" / "data" / "real" / "captions.jsonl"
    arguments = (
        f"storage.uri={tmp_path}", f"model.path={small_model(tmp_path / 'model')}",
        f"data.source={captions}", "train.trackers=[]", "train.lora_r=4", "train.cpus_per_worker=1",
        "train.epochs=20", "train.max_steps=72", "train.checkpoint_every_steps=8",
    )  # fmt: skip
    submit(head, "first", "train.py", *arguments)
    work = tmp_path / "work"

    def reached() -> int:
        found = work.glob("adapter-*/checkpoints/checkpoint_*/state.json")
        return max((json.loads(path.read_text())["step"] for path in found), default=0)

    wait_for(lambda: reached() >= 16, 180)
    assert api(head, "first/stop", method="POST")["stopped"]
    assert ended(head, "first") == "STOPPED"
    assert not list(tmp_path.glob("adapter/*"))
    left_at = reached()
    assert left_at < 72

    submit(head, "second", "train.py", *arguments)
    assert ended(head, "second", 180) == "SUCCEEDED", log_lines(head, "second")[-1]
    lines = log_lines(head, "second")
    resumed = [int(step) for step in re.findall(r"train: resumed at step (\d+)", "\n".join(lines))]
    # The last checkpoint may not have been registered yet when the job was stopped.
    assert len(resumed) == 1
    assert left_at - 8 <= resumed[0] <= left_at
    assert lines[-1] == str(next(tmp_path.glob("adapter/*")))
    assert {job["submission_id"] for job in api(head)} >= {"fails", "first", "second"}
