"""Break things in the middle of train, sweep, quantize and serve, and tell what was lost.

Each scenario has a cluster of its own on this machine and a copy of the artifacts that its stage
starts from, so that one scenario's damage is not another's.
"""

import json
import logging
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drill_clients import Clients
from drill_faults import Strike, mend, small_disk, strike, why_not
from drill_network import Network
from drill_nodes import (
    HEAD,
    DrillCluster,
    drill_cluster,
    is_work,
    wait_for,
)
from drill_results import (
    CLEAN_S,
    MEMORY_ALLOWANCE_BYTES,
    Outcome,
    corrupt_artifacts,
    missed_goals,
    now,
    plain,
)
from drill_stages import STAGES, Job, Stage, checkpoint_steps, losses

from llava_ray.artifacts.records import QuantizationRun, SweepResult
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import LlavaRayError, ResourceError

logger = logging.getLogger(__name__)

NODES = ("w1", "w2")
JOB_S = 300.0
"""What a small job may take, on a busy machine."""
SUBMISSIONS = 3
_CLIENTS = 4
_DISK_FULL_S = 10.0
"""How long an endpoint has to live with a full disk."""
_REPLICAS_S = 120.0
_AFTERWARDS_S = 5.0
_SETTLING_TRIALS = 10

_START_SERVE = (
    "import ray, sys; from ray import serve; ray.init(log_to_driver=False); "
    "serve.start(proxy_location='EveryNode', "
    "http_options={'host': '0.0.0.0', 'port': int(sys.argv[1])})"
)


@dataclass
class Scene:
    """A scenario while it is played."""

    cluster: DrillCluster
    stage: Stage
    fault: str
    storage: Path
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    seen: dict[str, Any] = field(default_factory=dict)
    """Fields of the outcome, as they become known."""

    def submit(self, *arguments: str) -> Job:
        """Start the stage's job."""
        self.seen["submissions"] = self.seen.get("submissions", 0) + 1
        return Job(
            self.cluster, self.stage.script, self.storage, *self.stage.overrides, *arguments,
            key=self.key,
        )  # fmt: skip


def run(pairs: list[tuple[str, str]], folder: Path) -> Iterator[Outcome]:
    """Play scenarios one after the other below a folder, and yield what each came to.

    Raises ResourceError when what the stages start from cannot be made.
    """
    for stage_name, fault in pairs:
        stage = STAGES[stage_name]
        begun = {"stage": stage_name, "fault": fault, "created": now()}
        reason = why_not(fault)
        if reason is not None:
            yield Outcome.model_validate({**begun, "skipped": reason})
            continue
        base = prepared(stage, folder)
        logger.info("drill: %s during %s", fault, stage_name)
        try:
            seen = _play(stage, fault, base, folder / f"{stage_name}-{fault}")
        except LlavaRayError as error:
            seen = {"error": plain(str(error))}
        outcome = Outcome.model_validate({**begun, **seen})
        yield outcome.model_copy(update={"missed": missed_goals(outcome)})


def prepared(stage: Stage, folder: Path) -> Path:
    """Return a storage with all that a stage starts from, made once on an undisturbed cluster.

    Raises ResourceError with the last line of a job that fails.
    """
    base, done = folder / "base", folder / f"base-{stage.before}.done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with drill_cluster(None, redis=False, nodes=NODES) as cluster:
            job = Job(cluster, stage.before, base, key="")
            if job.wait(2 * JOB_S) != 0:
                raise ResourceError(f"drill: jobs/{stage.before} failed: {job.last_line}")
        done.touch()
    return base


def _play(stage: Stage, fault: str, base: Path, folder: Path) -> dict[str, Any]:
    """Play one scenario; return the fields of its outcome."""
    shutil.rmtree(folder, ignore_errors=True)
    storage = folder / "storage"
    with ExitStack() as stack:
        if fault == "disk":
            stack.enter_context(small_disk(storage))
        shutil.copytree(base, storage, dirs_exist_ok=True)
        network = Network() if why_not("network") is None else None
        cluster = stack.enter_context(drill_cluster(network, redis=fault == HEAD, nodes=NODES))
        scene = Scene(cluster, stage, fault, storage)
        scene.seen["memory_before_bytes"] = _settled_memory(cluster)
        try:
            _disturb_endpoint(scene) if stage.name == "serve" else _disturb_job(scene)
            scene.seen |= _left_behind(scene)
        except LlavaRayError as error:
            scene.seen["error"] = plain(str(error))
        checked, corrupt = corrupt_artifacts(storage)
        staging = storage / ".staging"
        return scene.seen | {
            "artifacts_checked": checked,
            "artifacts_corrupt": corrupt,
            "staging_left": len(list(staging.iterdir())) if staging.is_dir() else 0,
        }


def _settled_memory(cluster: DrillCluster) -> int:
    """Return the memory of an idle cluster, once it grows no more."""
    memory = cluster.memory_bytes()
    for _ in range(_SETTLING_TRIALS):
        time.sleep(2)
        earlier, memory = memory, cluster.memory_bytes()
        if memory < earlier * 1.01:
            break
    return memory


def _disturb_job(scene: Scene) -> None:
    """Strike a job in its middle, mend, and submit it again until it finishes."""
    cluster, stage, storage = scene.cluster, scene.stage, scene.storage
    jobs = [scene.submit()]
    try:
        wait_for(
            lambda: bool(list(storage.glob(stage.signs))) or not jobs[0].running(),
            JOB_S, f"{stage.name} has not come to its middle",
        )  # fmt: skip
        time.sleep(1)
        if not jobs[0].running():
            raise ResourceError(f"{stage.name} ended before it was struck: {jobs[0].last_line}")
        scene.seen["checkpoint_steps"] = checkpoint_steps(storage, stage)
        struck_at = time.time()
        hit = strike(cluster, stage, scene.fault, storage)
        scene.seen["struck"] = [plain(name) for name in hit.struck]
        if scene.fault == "disk":
            # Nobody frees a disk before the job has met it.
            jobs[0].wait(JOB_S)
        mend(cluster, scene.fault, hit, storage)
        while (code := jobs[-1].wait(JOB_S)) != 0 and len(jobs) < SUBMISSIONS:
            scene.seen["failed_with"] = _last_words(jobs[-1], code)
            jobs.append(scene.submit())
        scene.seen["finished"] = code == 0
        if code != 0:
            scene.seen["failed_with"] = _last_words(jobs[-1], code)
    finally:
        for job in jobs:
            job.kill()
    loss = losses(stage, jobs, storage, struck_at)
    scene.seen |= {
        "recover_s": None if loss.recover_s is None else round(loss.recover_s, 1),
        "steps_lost": loss.steps_lost,
        "resumed_at_steps": loss.resumed_at_steps,
        "begun_again": loss.again,
        "failed_parts": _failed_parts(storage),
    }


def _disturb_endpoint(scene: Scene) -> None:
    """Strike an endpoint that is being asked, mend, and wait until all of it is there again."""
    cluster = scene.cluster
    host = "0.0.0.0" if cluster.network else "127.0.0.1"
    addresses = sorted(set(cluster.addresses.values())) if cluster.network else [host]
    port = cluster.serve_port
    if cluster.network:
        _start_proxies(cluster)
    job = scene.submit(f"serve.host={host}", f"serve.port={port}")
    code = job.wait(JOB_S)
    if code != 0:
        raise ResourceError(f"no endpoint to strike: {_last_words(job, code)}")
    clients = Clients([(a, port) for a in addresses], key=scene.key, count=_CLIENTS)
    clients.start()
    try:
        wait_for(lambda: clients.whole() >= 2 * _CLIENTS, JOB_S, "the endpoint does not answer")
        start = time.monotonic()
        hit = strike(cluster, scene.stage, scene.fault, scene.storage)
        scene.seen["struck"] = [plain(name) for name in hit.struck]
        if scene.fault == "disk":
            time.sleep(_DISK_FULL_S)
        mend(cluster, scene.fault, hit, scene.storage)
        wait_for(
            lambda: _all_replicas(cluster, hit) and clients.healthy(),
            _REPLICAS_S, "not all replicas came back",
        )  # fmt: skip
        scene.seen["recover_s"] = round(time.monotonic() - start, 1)
        time.sleep(_AFTERWARDS_S)
        scene.seen["finished"] = True
    finally:
        scene.seen["requests"] = clients.stop()
    cluster.request("DELETE", "/api/serve/applications/")


def _start_proxies(cluster: DrillCluster) -> None:
    """Let every node with a replica listen, as on Kubernetes, so that the head can be lost."""
    done = subprocess.run(
        [sys.executable, "-c", _START_SERVE, str(cluster.serve_port)],
        env=cluster.client_environment(), timeout=JOB_S, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ResourceError(f"Ray Serve did not start: {done.stderr.strip().splitlines()[-1]}")


def _all_replicas(cluster: DrillCluster, hit: Strike) -> bool:
    """Say whether the application runs with every replica alive on a node that is there."""
    body = cluster.request("GET", "/api/serve/applications/")
    application = json.loads(body)["applications"].get("llava_ray") if body else None
    if application is None or application["status"] != "RUNNING":
        return False
    alive = {process.pid: node for process, node in cluster.working("ServeReplica").items()}
    for deployment in application["deployments"].values():
        replicas = deployment["replicas"]
        if len(replicas) < deployment["target_num_replicas"]:
            return False
        if any(
            r["state"] != "RUNNING" or alive.get(r["pid"]) in (None, hit.node) for r in replicas
        ):
            return False
    return True


def _left_behind(scene: Scene) -> dict[str, Any]:
    """Wait until nothing of the work is left, for a minute at most; return what is."""
    cluster, start = scene.cluster, time.monotonic()
    limit = scene.seen["memory_before_bytes"] + MEMORY_ALLOWANCE_BYTES
    while True:
        actors = tuple(cluster.actors())
        workers = tuple(sorted(t for t in cluster.processes().values() if is_work(t)))
        memory = cluster.memory_bytes()
        waited = time.monotonic() - start
        clean = not actors and not workers and memory <= limit
        if clean or waited > CLEAN_S:
            return {
                "actors_left": actors,
                "workers_left": workers,
                "memory_after_bytes": memory,
                "clean_after_s": round(waited, 1) if clean else None,
            }
        time.sleep(1)


def _failed_parts(storage: Path) -> tuple[str, ...]:
    """Name trials and variants that failed in a job that went on."""
    store = ArtifactStore(str(storage))
    failed = [
        f"trial {trial.number}: {trial.error}"
        for sweep in store.find_all(SweepResult)
        for trial in sweep.trials
        if trial.status == "failed"
    ]
    for quantization in store.find_all(QuantizationRun)[-1:]:
        failed += [f"{failure.slug}: {failure.reason}" for failure in quantization.failures]
    return tuple(failed)


def _last_words(job: Job, code: int | None) -> str:
    return (
        f"exit code {code}: {plain(job.last_line)}" if code is not None else "did not end in time"
    )
