"""The drill's own judgement and tools, and scenarios played for real."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drill
import pytest
from drill_clients import ATTEMPTS, Clients
from drill_faults import DISK_BYTES, fill, scenarios, small_disk
from drill_network import Network, why_no_network
from drill_nodes import DrillCluster
from drill_results import (
    MEMORY_ALLOWANCE_BYTES,
    Outcome,
    corrupt_artifacts,
    missed_goals,
    outcome_line,
    plain,
    write_results,
)
from drill_stages import CHECKPOINT_EVERY_STEPS, STAGES, checkpoint_steps, losses

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ResourceError

GOOD = {
    "stage": "train", "fault": "node", "created": "2026-01-01T00:00:00+00:00", "finished": True,
    "submissions": 1, "checkpoint_steps": {"adapter-0": 8}, "resumed_at_steps": [8, 8],
    "steps_lost": 3,
}  # fmt: skip


def test_a_scenario_that_keeps_every_goal_misses_none() -> None:
    assert missed_goals(Outcome.model_validate(GOOD)) == ()


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"finished": False, "failed_with": "exit code 1: boom"}, "did not finish: exit code 1"),
        ({"error": "train has no worker"}, "not carried out: train has no worker"),
        ({"artifacts_corrupt": ["a.bin differs"]}, "corrupt: a.bin differs"),
        ({"steps_lost": CHECKPOINT_EVERY_STEPS + 1}, "9 steps lost"),
        ({"resumed_at_steps": [4, 4]}, "went on before the checkpoint of step 8"),
        ({"resumed_at_steps": []}, "went on before the checkpoint of step 8"),
        ({"failed_parts": ["hqq-w4-g64: gone"]}, "failed for good: hqq-w4-g64"),
        ({"actors_left": ["RayTrainWorker ALIVE"]}, "left after 60 s: RayTrainWorker"),
        ({"workers_left": ["ray::RayTrainWorker"]}, "left after 60 s: ray::RayTrainWorker"),
        ({"memory_after_bytes": MEMORY_ALLOWANCE_BYTES + 2**20}, "257 MiB more than before"),
        ({"fault": "disk", "failed_with": "exit code 1: OSError"}, "a full disk is not named"),
        (
            {"requests": {"whole": 9, "sent_again": 0, "cut": 1, "lost": 2, "longest_gap_s": 1,
                          "errors": []}},
            "2 requests failed that had not begun",
        ),
    ],
)  # fmt: skip
def test_each_goal_that_is_missed_is_named(changed: dict[str, Any], missed: str) -> None:
    outcome = Outcome.model_validate({**GOOD, **changed})
    (found,) = missed_goals(outcome)
    assert missed in found
    shown = outcome_line(outcome.model_copy(update={"missed": (found,)}))
    assert shown.startswith("BAD ") and found in shown


def test_a_full_disk_that_is_named_is_no_shortfall() -> None:
    told = "exit code 2: error: no space left at /x: free some"
    assert (
        missed_goals(Outcome.model_validate({**GOOD, "fault": "disk", "failed_with": told})) == ()
    )


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    with ArtifactStore(str(tmp_path)).build(DatasetRecord, "dataset-1", settings={}) as build:
        (build.folder / "train.json").write_text("[]")
        record = build.finish(
            DatasetRecord, device="cpu", source="x", num_train=0, num_test=0, rejected={}
        )
    assert corrupt_artifacts(tmp_path) == (1, ())
    (Path(record.uri) / "train.json").write_text("[1]")
    checked, corrupt = corrupt_artifacts(tmp_path)
    assert checked == 1
    assert "train.json differs from the manifest" in corrupt[0]


def test_what_was_done_twice_is_read_from_the_jobs_lines(tmp_path: Path) -> None:
    def job(*lines: tuple[float, str]) -> Any:
        return SimpleNamespace(lines=list(lines))

    first = job(
        (1, "(quantize x pid=5) 12:00:00 INFO hqq-w4-g64: starts on cpu, about 3 MB"),
        (2, "(quantize x pid=6) 12:00:01 INFO bnb-nf4: starts on cpu, about 3 MB"),
        # Another node that reads the same log.
        (2, "(quantize x pid=6, ip=10.0.0.2) 12:00:01 INFO bnb-nf4: starts on cpu, about 3 MB"),
    )
    again = job((14, "(quantize x pid=7) 12:00:13 INFO bnb-nf4: starts on cpu, about 3 MB"))
    loss = losses(STAGES["quantize"], [first, again], tmp_path, struck_at=10)
    assert (loss.again, loss.recover_s) == (("bnb-nf4",), 4)
    assert losses(STAGES["quantize"], [first], tmp_path, struck_at=10).again == ()

    trained = job(
        (3, "(RayTrainWorker pid=3) train: resumed at step 2"),
        (15, "(RayTrainWorker pid=4) train: resumed at step 8"),
        (15, "(RayTrainWorker pid=4, ip=10.0.0.2) train: resumed at step 8"),
    )
    loss = losses(STAGES["sweep"], [trained], tmp_path, struck_at=10)
    assert (loss.resumed_at_steps, loss.recover_s, loss.again) == ((8,), 5, ())


def test_steps_done_twice_are_counted_from_tensorboard(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def write(steps: range, start: float) -> None:
        with SummaryWriter(str(tmp_path / "work" / "adapter-1" / "tensorboard")) as writer:
            for step in steps:
                writer.add_scalar("train/loss", 1.0, step, walltime=start + step)

    write(range(1, 7), 100)
    write(range(5, 9), 120)
    loss = losses(STAGES["train"], [], tmp_path, struck_at=110)
    assert (loss.steps_lost, loss.resumed_at_steps, loss.recover_s) == (2, (4,), 15)


def test_only_checkpoints_that_ray_train_knows_of_count(tmp_path: Path) -> None:
    run = tmp_path / "work" / "adapter-1" / "checkpoints"
    for step in (8, 16):
        (run / f"checkpoint_{step}").mkdir(parents=True)
        (run / f"checkpoint_{step}" / "state.json").write_text(json.dumps({"step": step}))
    assert checkpoint_steps(tmp_path, STAGES["train"]) == {}
    known = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_8"}]}
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps(known))
    assert checkpoint_steps(tmp_path, STAGES["train"]) == {"adapter-1": 8}


def test_results_of_other_scenarios_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results" / "drill.json"
    one = Outcome.model_validate(GOOD)
    other = one.model_copy(update={"fault": "worker"})
    write_results(path, [one, other])
    write_results(path, [one.model_copy(update={"steps_lost": 1})])
    tree = json.loads(path.read_text())
    rows = tree["scenarios"]
    assert rows[0]["code_digest"] == tree["code_digest"] and "code_digest" not in rows[1]
    assert [(row["fault"], row["steps_lost"]) for row in rows] == [("worker", 3), ("node", 1)]


def test_results_name_no_folder_of_this_machine() -> None:
    told = "\x1b[36m(x pid=1)\x1b[0m no space left at /tmp/a-1/storage: see 1/2"
    assert plain(told) == "(x pid=1) no space left at storage: see 1/2"


def test_scenarios_are_named_by_stage_and_fault() -> None:
    assert scenarios(["train:node"]) == [("train", "node")]
    assert {stage for stage, _ in scenarios([])} == {"train", "sweep", "quantize", "serve"}
    assert len(scenarios([])) == 4 * 5 + 1
    with pytest.raises(ResourceError, match="no drill 'train:replica'"):
        scenarios(["train:replica"])
    command = [sys.executable, str(Path(__file__).parent), "train:replica"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no drill 'train:replica'" in done.stderr


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers each request by the next of `plan`: whole, cut, early (before a token) or 503."""

    plan: Iterator[str]

    def do_POST(self) -> None:
        kind = next(self.plan, "whole")
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503 if kind == "503" else 200)
        self.end_headers()
        if kind in ("whole", "cut"):
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "S"}}]}\n\n')
        if kind == "cut":
            self.wfile.write(b'data: {"error": {"code": "engine_lost"}}\n\n')
        if kind == "whole":
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep silent."""


@pytest.mark.parametrize(
    ("plan", "sent_again", "cut", "lost"),
    [
        ([], 0, 0, 0),
        (["whole", "cut"], 0, 1, 0),
        (["whole", "503", "early"], 2, 0, 0),
        (["early"] * ATTEMPTS, ATTEMPTS - 1, 0, 1),
    ],
)
def test_clients_tell_how_each_request_ended(
    plan: list[str], sent_again: int, cut: int, lost: int
) -> None:
    handler = type("Planned", (Answers,), {"plan": iter(plan)})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        clients = Clients([("127.0.0.1", server.server_port)], key="k", count=1)
        clients.start()
        while clients.whole() < 3:
            assert clients.running()
        found = clients.stop()
        server.shutdown()
        thread.join()
    assert (found.sent_again, found.cut, found.lost) == (sent_again, cut, lost)
    assert found.whole >= 3


def test_only_the_drills_own_disk_is_filled(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    if space.f_blocks * space.f_frsize <= DISK_BYTES:
        pytest.skip("the temporary folder is itself a small disk")
    with pytest.raises(ResourceError, match="left alone"):
        fill(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_full_and_gone_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    try:
        with small_disk(disk):
            fill(disk)
            with pytest.raises(OSError, match="No space left"):
                (disk / "more").write_bytes(b"x" * 10_000)
    except ResourceError as error:
        pytest.skip(f"cannot mount here: {error}")
    assert list(disk.iterdir()) == []


def test_a_cut_cable_is_felt(tmp_path: Path) -> None:
    reason = why_no_network()
    if reason is not None:
        pytest.skip(reason)
    network = Network()
    try:
        network.create()
        address = network.add("w1")
        assert _reaches(address)
        network.cut("w1")
        assert not _reaches(address)
        network.heal("w1")
        assert _reaches(address)
    finally:
        network.remove()
    assert not Path(f"/run/netns/{network.space('w1')}").exists()


def _reaches(address: str) -> bool:
    """Whether a node answers at all: a refusal is an answer."""
    with socket.socket() as probe:
        probe.settimeout(2)
        try:
            probe.connect((address, 9))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return True


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")
def test_redis_starts_with_a_password_and_goes_with_its_cluster() -> None:
    cluster = DrillCluster(None, redis=True)
    try:
        cluster._start_redis("secret")
        with socket.create_connection(("127.0.0.1", cluster.redis_port), timeout=5) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100).startswith(b"-NOAUTH")
    finally:
        cluster.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", cluster.redis_port)) != 0
    assert not cluster.folder.exists()


def play(names: list[str], folder: Path) -> dict[str, Outcome]:
    found = {f"{o.stage}:{o.fault}": o for o in drill.run(scenarios(names), folder)}
    for name, outcome in found.items():
        if outcome.skipped:
            pytest.skip(f"{name}: {outcome.skipped}")
        print(outcome_line(outcome))
    return found


@pytest.mark.slow
@pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="minutes: set LLAVA_RAY_SLOW=1")
@pytest.mark.parametrize("name", ["train:worker", "train:head", "quantize:node", "serve:replica"])
def test_what_is_lost_comes_back(tmp_path: Path, name: str) -> None:
    outcome = play([name], tmp_path)[name]
    assert outcome.missed == ()
