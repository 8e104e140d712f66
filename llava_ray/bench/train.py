"""Speed and memory of LoRA training beside plain transformers + peft, from one run.

LLaVA-1.5-7B's shapes with random weights, r=48 on all linear layers of the language model, the
projector trained. Rows of one kind share a process; a process that dies costs only its own rows.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench.train_rows import Row, Task, flop_per_sample
from llava_ray.errors import ConfigError
from llava_ray.resources.devices import device_name

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "liger-kernel", "triton")
GRACE_S = 60
"""How long after the deadline a process may finish its row."""

ROWS: tuple[Row, ...] = (
    Row("plain-b4", "plain", 4),
    Row("plain-b8", "plain", 8),
    Row("plain-ckpt-b8", "plain", 8, True),
    Row("replica-b4", "replica", 4),
    Row("replica-b8", "replica", 8),
    Row("replica-b16", "replica", 16),
    Row("replica-ckpt-b8", "replica", 8, True),
    Row("zero2-b4", "zero2", 4),
    Row("zero2-b8", "zero2", 8),
    Row("zero2-b16", "zero2", 16),
    Row("zero2-ckpt-b8", "zero2", 8, True),
)
MORE_ROWS: tuple[Row, ...] = (
    Row("replica-b1", "replica", 1),
    Row("replica-b2", "replica", 2),
    Row("replica-b12", "replica", 12),
    Row("replica-b24", "replica", 24),
    Row("replica-mlp-b8", "replica", 8, "mlp"),
    Row("replica-mlp-b16", "replica", 16, "mlp"),
    Row("replica-ckpt-b1", "replica", 1, True),
    Row("replica-ckpt-b32", "replica", 32, True),
    Row("replica-dropout-b8", "replica", 8, lora_dropout=0.05),
    Row("replica-peft-b4", "replica", 4, fused_layers=False),
    Row("replica-peft-b8", "replica", 8, fused_layers=False),
    Row("replica-peft-ckpt-b8", "replica", 8, True, fused_layers=False),
    Row("zero2-b1", "zero2", 1),
    Row("zero2-mlp-b16", "zero2", 16, "mlp"),
    Row("zero2-dropout-b8", "zero2", 8, lora_dropout=0.05),
    Row("zero3-b8", "zero3", 8, fused_layers=False),
    Row("zero3-ckpt-b8", "zero3", 8, True, fused_layers=False),
    Row("plain-b1", "plain", 1),
    Row("plain-b2", "plain", 2),
    Row("plain-b12", "plain", 12),
    Row("plain-ckpt-b1", "plain", 1, True),
    Row("plain-ckpt-b4", "plain", 4, True),
    Row("plain-dropout-b8", "plain", 8, lora_dropout=0.05),
    Row("plain-liger-b4", "plain", 4, liger=True),
    Row("plain-liger-b8", "plain", 8, liger=True),
    Row("plain-compile-b4", "plain", 4, compile=True),
    Row("plain-compile-b8", "plain", 8, compile=True),
)


def choose_rows(only: Sequence[str], tiny: bool) -> list[Row]:
    """Return the default rows, or those whose names are given.

    Raises ConfigError for a name that no row has.
    """
    known = {row.name: row for row in (*ROWS, *MORE_ROWS)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r}: no such row; there are {', '.join(known)}")
    chosen = [known[name] for name in only] or list(ROWS)
    return [row for row in chosen if row.batch <= 8] if tiny else chosen


def run(
    out: Path, *, only: Sequence[str] = (), minutes: float = 5, gpus: Sequence[int] = (1,),
    tiny: bool = False, tokens: int | None = None, ray: bool = False,
) -> str:  # fmt: skip
    """Measure, write JSON after each process and return the table as text.

    With `ray` every row is measured once more, in workers that Ray Train starts.
    """
    chosen = choose_rows(only, tiny)
    began, rows = time.time(), list[Row]()
    for number in gpus:
        for group in grouped(chosen):
            left = began + minutes * 60
            task = Task(group, tiny, tokens or (40 if tiny else 756), "", left)
            for launcher in (_in_processes, _in_ray) if ray else (_in_processes,):
                rows += run_group(task, number, launcher)
                write(out, rows, task, time.time() - began)
    return table(rows)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Put rows together that one model can serve, in their order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setup(), []).append(row)
    return list(groups.values())


Launcher = Callable[[Path, int, float], str]
"""Runs a folder's task.json on a number of workers until a time; returns why it ended early."""


def run_group(task: Task, world: int, launcher: Launcher) -> list[Row]:
    """Run one worker per GPU over a task's rows and read what they wrote."""
    kind: Literal["processes", "ray"] = "ray" if launcher is _in_ray else "processes"
    rows = [replace(row, gpus=world, launcher=kind) for row in task.rows]
    with tempfile.TemporaryDirectory(prefix="llava_ray_bench_") as name:
        folder = Path(name)
        lines, log = folder / "rows.jsonl", folder / "log"
        tree = asdict(replace(task, rows=rows, out=str(lines)))
        (folder / "task.json").write_text(json.dumps(tree), encoding="utf-8")
        reason = launcher(folder, world, task.deadline + GRACE_S)
        text = lines.read_text(encoding="utf-8") if lines.exists() else ""
        found = [Row(**json.loads(line)) for line in text.splitlines()]
        found += [replace(row, failed=reason or "not measured") for row in rows[len(found) :]]
        if any(row.failed for row in found) and log.exists():
            logger.warning("%s", log.read_text(encoding="utf-8", errors="replace")[-6000:])
    for row in found:
        logger.info("%s", json.dumps(asdict(row)))
    return found


def _in_ray(folder: Path, world: int, until: float) -> str:
    """Let Ray Train start the workers, on this machine alone."""
    import ray
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    path = folder / "task.json"
    ray.init(address="local", logging_level=logging.WARNING)
    try:
        TorchTrainer(
            _ray_worker,
            train_loop_config={"task": str(path)},
            scaling_config=ScalingConfig(num_workers=world, use_gpu=torch.cuda.is_available()),
            run_config=RunConfig(storage_path=str(folder / "ray")),
        ).fit()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        ray.shutdown()
    return ""


def _ray_worker(config: dict[str, Any]) -> None:
    from llava_ray.bench.train_rows import read_task
    from llava_ray.bench.train_rows import run as run_rows

    run_rows(read_task(Path(config["task"])))


def _in_processes(folder: Path, world: int, until: float) -> str:
    """Start the workers as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava_ray.bench.train_rows", str(folder / "task.json")]
    # Row by row PyTorch would else keep pieces of memory that no longer fit together.
    base = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    with (folder / "log").open("w") as stream:
        processes = [
            subprocess.Popen(
                command, stdout=stream, stderr=stream,
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            codes = [p.wait(timeout=max(1, until - time.time())) for p in processes]
        except subprocess.TimeoutExpired:
            return "the time given with --minutes was over"
        finally:
            for process in processes:
                process.kill()
    bad = [code for code in codes if code]
    return f"the process ended with code {bad[0]}" if bad else ""


def write(out: Path, rows: Sequence[Row], task: Task, seconds: float) -> None:
    """Write all rows with what they were measured on."""
    import torch

    gpu = torch.cuda.is_available()
    tree = {
        "device": device_name("cuda" if gpu else "cpu"),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": sys.version.split()[0]},
        "code_digest": code_digest("train_h100"),
        "command": " ".join(["python", *(a if a != str(out) else out.name for a in sys.argv)]),
        "model": "a tiny LLaVA" if task.tiny else "LLaVA-1.5-7B shapes, random weights",
        "lora": "r=48 on all linear layers of the language model; the projector trained",
        "tokens": task.tokens,
        "precision": "bf16" if gpu else "fp32",
        "flop_per_sample": flop_per_sample(task.shapes, task.tokens, 48),
        "seconds": seconds,
        **verdicts(rows),
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def verdicts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the best rate of plain and of this project, their ratio, and the scaling by GPUs."""
    good = [row for row in rows if not row.failed]
    under_ray = {(r.name, r.gpus): r.samples_per_s for r in good if r.launcher == "ray"}
    good = [row for row in good if row.launcher == "processes"]
    single = [row for row in good if row.gpus == 1]
    plain = max((r.samples_per_s for r in single if r.engine == "plain"), default=None)
    ours = max((r.samples_per_s for r in single if r.engine != "plain"), default=None)
    alone = {row.name: row.samples_per_s for row in single}
    return {
        "best_plain_samples_per_s": plain,
        "best_samples_per_s": ours,
        "speedup": ours / plain if ours and plain else None,
        "scaling": {
            f"{row.name} on {row.gpus} GPUs": row.samples_per_s / alone[row.name]
            for row in good
            if row.gpus > 1 and row.name in alone
        },
        "ray_share": {
            f"{row.name} on {row.gpus} GPUs": under_ray[row.name, row.gpus] / row.samples_per_s
            for row in good
            if (row.name, row.gpus) in under_ray
        },
    }


def table(rows: Sequence[Row]) -> str:
    """Return the table as text."""
    lines = [
        f"{'row':24} {'GPUs':>4} {'batch':>5} {'samples/s':>9} {'min':>7} {'max':>7} "
        f"{'GB':>6} {'TFLOP/s':>7} {'warm s':>6} {'norm':>8} losses"
    ]
    for row in rows:
        name = f"{row.name} (ray)" if row.launcher == "ray" else row.name
        start = f"{name:24} {row.gpus:4} {row.batch:5} "
        if row.failed:
            lines.append(start + row.failed)
            continue
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
        lines.append(
            f"{start}{row.samples_per_s:9.2f} {row.samples_per_s_min:7.2f} "
            f"{row.samples_per_s_max:7.2f} {peak:>6} {row.tflop_per_s:7.1f} {row.warm_up_s:6.1f} "
            f"{row.check_grad_norm:8.4f} {' '.join(f'{x:.4f}' for x in row.check_losses)}"
        )
    return "\n".join(lines)
