"""The stages that a drill disturbs: their jobs, when each is in the middle, what it has lost."""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from drill_nodes import ENGINE, REPOSITORY, DrillCluster

CHECKPOINT_EVERY_STEPS = 8
"""They take longer than the 2 s after which Ray Train's controller looks for new checkpoints."""
TRAIN_STEPS = 48
SWEEP_STEPS = 18
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""In a run's folder: the checkpoints that Ray Train knows of, and goes on from."""
SHARED = (
    "model.path=embedded", "data.source=scene-text", "data.limit=40", "train.num_workers=2",
    "train.cpus_per_worker=1", "train.lora_r=8", "train.lora_alpha=16", "train.max_steps=2",
    "train.trackers=[]", "merge.probe_samples=1",
    "benchmark.fidelity_samples=2", "benchmark.caption_samples=2", "benchmark.shown_samples=1",
    "benchmark.max_new_tokens=16", "benchmark.decode_tokens=8", "benchmark.repeats=1",
    "benchmark.warmup=0", "choose.max_kl_divergence=null", "serve.model_name=drilled",
    "serve.min_replicas=2", "serve.max_replicas=2", "serve.cpus_per_replica=0.4",
    "serve.max_concurrent_requests=4", "serve.context=512",
)  # fmt: skip
"""Small enough for two CPUs; the same for all stages, so that they find each other's artifacts."""
_FEW = "quantize.variants=[none-fp16,hqq-w8-g64]"
_HQQ = ",".join(f"hqq-w{bits}-g{group}" for bits in (8, 4, 3, 2) for group in (64, 32, 128))
"""About a second of work each, so that a fault finds some of them under way."""
_RESUMED = re.compile(r"pid=(\d+).*train: resumed at step (\d+)")
_QUANTIZING = re.compile(r"pid=(\d+).* (\S+) INFO (\S+): starts on ")


@dataclass(frozen=True)
class Stage:
    """A job that a fault strikes."""

    name: str
    script: str
    before: str
    """The job that leaves all that this one starts from."""
    overrides: tuple[str, ...]
    signs: str
    """Files below the storage, by glob, that show that the work is in its middle."""
    workers: tuple[str, ...]
    """In the titles of the processes that do the work."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "train", "train.py", "prepare.py",
            (f"train.max_steps={TRAIN_STEPS}", "train.trackers=[tensorboard]",
             f"train.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}"),
            f"work/adapter-*/checkpoints/{_SNAPSHOT}",
            ("RayTrainWorker",),
        ),
        Stage(
            "sweep", "sweep.py", "prepare.py",
            ("train.num_workers=1", f"train.max_steps={SWEEP_STEPS}", "sweep.scheduler=fifo",
             "sweep.space={learning_rate: {grid: [1e-4, 1e-3, 1e-2]}}", "sweep.num_trials=1"),
            f"work/sweep-*/trials/*/checkpoints/{_SNAPSHOT}",
            ("RayTrainWorker",),
        ),
        Stage(
            "quantize", "quantize.py", "merge.py",
            (f"quantize.variants=[none-fp16,bnb-nf4,bnb-int8,{_HQQ}]",),
            ".staging/variant-*/files/*",
            ("ray::none-", "ray::bnb-", "ray::hqq-"),
        ),
        Stage("serve", "deploy.py", "choose.py", (), "", (ENGINE,)),
    )
}  # fmt: skip


class Job:
    """A job's driver on the head, and every line it has said with its time."""

    def __init__(
        self, cluster: DrillCluster, script: str, storage: Path, *arguments: str, key: str
    ) -> None:
        self._log = storage.with_suffix(".log")
        self.lines: list[tuple[float, str]] = []
        self._driver = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs" / script), f"storage.uri={storage}",
             *SHARED, _FEW, *arguments],
            cwd=REPOSITORY, env={**cluster.client_environment(), "LLAVA_RAY_API_KEY": key},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code; None, and the driver is killed, where it does not end in time."""
        try:
            code = self._driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()
            return None
        self._reader.join(timeout=10)
        return code

    def running(self) -> bool:
        """Say whether the driver lives."""
        return self._driver.poll() is None

    def kill(self) -> None:
        """Kill the driver if it lives."""
        if self.running():
            self._driver.kill()
        self._driver.wait()

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        return next((text for _, text in reversed(self.lines) if text), "")

    def _read(self) -> None:
        assert self._driver.stdout is not None
        with self._log.open("a", encoding="utf-8") as log:
            for line in self._driver.stdout:
                self.lines.append((time.time(), line.strip()))
                log.write(line)


@dataclass(frozen=True)
class Loss:
    """What a fault has cost a training, a sweep or a quantization."""

    recover_s: float | None
    """Seconds from the fault until the lost work was taken up again."""
    steps_lost: int | None
    """Optimizer steps done before the fault and again after it."""
    resumed_at_steps: tuple[int, ...]
    again: tuple[str, ...]
    """Variants that were begun a second time."""


def checkpoint_steps(storage: Path, stage: Stage) -> dict[str, int]:
    """Return the last checkpoint's step of the run, or of each trial of a sweep, by folder."""
    steps: dict[str, int] = {}
    for path in storage.glob(stage.signs) if stage.signs.endswith(_SNAPSHOT) else ():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["checkpoint_results"]
            states = [path.parent / each["checkpoint_dir_name"] / "state.json" for each in known]
            steps[path.parents[1].name] = max(json.loads(s.read_text())["step"] for s in states)
        except (OSError, ValueError):
            continue  # Being written, or already pruned.
    return steps


def losses(stage: Stage, jobs: list[Job], storage: Path, struck_at: float) -> Loss:
    """Tell from the drivers' lines and TensorBoard's events what was done twice."""
    lines = [line for job in jobs for line in job.lines]
    if stage.name == "quantize":
        return _variants_again(lines, struck_at)
    if stage.name == "train":
        return _steps_again(_train_events(storage), struck_at)
    resumed: dict[str, tuple[float, int]] = {}
    for when, text in lines:
        if when > struck_at and (match := _RESUMED.search(text)):
            # The nodes of a drill share their logs, so each of them repeats a process's line.
            resumed.setdefault(match[1], (when, int(match[2])))
    recover_s = min(resumed.values())[0] - struck_at if resumed else None
    return Loss(recover_s, None, tuple(step for _, step in resumed.values()), ())


def _steps_again(files: list[list[tuple[float, int]]], struck_at: float) -> Loss:
    """Compare the events of the processes that wrote before the fault with those of later ones."""
    before = [step for events in files for when, step in events if when <= struck_at]
    later = sorted(events for events in files if events[0][0] > struck_at)
    if not later:
        return Loss(None, None, (), ())
    resumed_at = tuple(events[0][1] - 1 for events in later)
    lost = max(before) - resumed_at[0] if before else None
    return Loss(later[0][0][0] - struck_at, lost, resumed_at, ())


def _variants_again(lines: list[tuple[float, str]], struck_at: float) -> Loss:
    begun: dict[str, dict[tuple[str, str], float]] = {}
    for when, text in lines:
        if match := _QUANTIZING.search(text):
            process, clock, slug = match.groups()
            begun.setdefault(slug, {}).setdefault((process, clock), when)
    again = {slug: sorted(times.values())[1] for slug, times in begun.items() if len(times) > 1}
    recover_s = min(again.values()) - struck_at if again else None
    return Loss(recover_s, None, (), tuple(sorted(again)))


def _train_events(storage: Path) -> list[list[tuple[float, int]]]:
    """Return (time, step) of the training steps that TensorBoard heard of, by file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = []
    for path in storage.glob("*/adapter-*/tensorboard/events.*"):
        events = [
            (event.wall_time, event.step)
            for event in EventFileLoader(str(path)).Load()
            if any(value.tag == "train/loss" for value in event.summary.value)
        ]
        files += [sorted(events)] if events else []
    return files
