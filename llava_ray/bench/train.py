"""Speed and memory of LoRA training beside plain transformers + peft, from one run.

LLaVA-1.5-7B's shapes with random weights, r=48 on all linear layers of the language model, the
projector trained. Rows of one kind share processes; processes that die cost only their own rows.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch

from llava_ray.bench import results
from llava_ray.bench.train_rows import LORA_R, EngineName, Row, Task, flop_per_sample
from llava_ray.errors import ConfigError

logger = logging.getLogger(__name__)

GRACE_S = 60
"""How long after the deadline a process may finish its row."""
ROWS = (
    "plain-b4", "plain-b8", "plain-ckpt-b8", "plain-liger-b4", "plain-liger-b8",
    "replica-b4", "replica-b8", "replica-b16", "replica-ckpt-b8",
    "zero2-b4", "zero2-b8", "zero2-b16", "zero2-ckpt-b8",
    "replica-b8@2", "replica-b16@2", "replica-ray-b8@2", "replica-ray-b16@2",
    "zero2-b8@2", "zero2-b16@2", "zero3-b8@2", "zero3-b16@2", "zero3-fp16-accum4-ckpt-b1@2",
    "plain-compile-b8",
)  # fmt: skip
"""What is measured where no rows are asked for; the last on two GPUs has the article's flags."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ckpt": {"checkpointing": True},
    "mlp": {"checkpointing": "mlp"},
    "dropout": {"lora_dropout": 0.05},
    "peft": {"fused_layers": False},
    "liger": {"liger": True},
    "compile": {"compile": True},
    "fp16": {"fp16": True},
    "accum4": {"accumulation": 4},
    "ray": {"ray": True},
}
"""By the word in a row's name."""


def parse_row(name: str) -> Row:
    """Read a name such as `replica-ckpt-b8@2`: an engine, options, samples per GPU, and GPUs.

    Raises ConfigError for another name.
    """
    engine, *options, last = name.split("-")
    size = re.fullmatch(r"b([1-9]\d*)(?:@([1-9]\d*))?", last)
    if engine not in get_args(EngineName) or not OPTIONS.keys() >= set(options) or size is None:
        raise ConfigError(
            f"--only {name!r}: no such row; a name is one of {', '.join(get_args(EngineName))}, "
            f"then any of {', '.join(OPTIONS)}, then b and a number, joined by '-'; @ and a number "
            "of GPUs may follow"
        )
    changes = {key: value for option in options for key, value in OPTIONS[option].items()}
    engine_name: Any = engine
    return Row(name, engine_name, int(size[1]), gpus=int(size[2] or 1), **changes)


def run(
    out: Path, *, only: Sequence[str] = (), minutes: float = 9, tiny: bool = False
) -> None:  # fmt: skip
    """Measure rows of these names and write JSON after those of each kind.

    What an earlier call wrote there on the same machine, with the same versions and code, stays.
    """
    start = time.time()
    tokens, device = 40 if tiny else 756, "cuda" if torch.cuda.is_available() else "cpu"
    rows = _measured(out, device)
    done = {row.name for row in rows}
    kinds: dict[Any, list[Row]] = {}
    for row in map(parse_row, only or ROWS):
        if row.name not in done:
            kinds.setdefault(row.kind(), []).append(row)
    for kind in kinds.values():
        task = Task(kind, tiny, tokens, deadline=start + minutes * 60)
        rows += measure(task, kind[0].gpus)
        tree = {
            "model": "a tiny LLaVA" if tiny else "LLaVA-1.5-7B shapes, random weights",
            "lora": f"r={LORA_R} on all linear layers of the language model, and the projector",
            "tokens": tokens,
            "precision": "bf16" if device == "cuda" else "fp32",
            "flop_per_sample": flop_per_sample(task.shapes, tokens),
            "seconds": time.time() - start,
            "rows": [asdict(row) for row in rows],
        }
        results.write(out, "train_h100", tree, device)


def _measured(out: Path, device: str) -> list[Row]:
    """Return the rows in a file of this machine and code."""
    if not out.exists():
        return []
    tree, head = json.loads(out.read_text(encoding="utf-8")), results.head("train_h100", device)
    if any(tree.get(key) != head[key] for key in ("device", "versions", "code_digest")):
        return []
    return [Row(**row) for row in tree["rows"] if not row["failed"]]


def measure(task: Task, world: int) -> list[Row]:
    """Run one process per GPU over a task's rows; rows that it does not reach have failed."""
    if 0 < torch.cuda.device_count() < world:
        reason = f"{world} GPUs are needed, {torch.cuda.device_count()} here"
        return [replace(row, failed=reason) for row in task.rows]
    with tempfile.TemporaryDirectory(prefix="llava_ray_bench_") as name:
        given, written = Path(name) / "task.json", Path(name) / "rows.jsonl"
        given.write_text(json.dumps(asdict(task)), encoding="utf-8")
        ray = task.rows[0].ray
        torchrun = [
            "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            f"--nproc-per-node={world}",
        ]  # fmt: skip
        command = [
            sys.executable, *([] if ray else torchrun), "-m", "llava_ray.bench.train_rows",
            str(given), str(written), *([str(world)] if ray else []),
        ]  # fmt: skip
        # Row by row PyTorch would else keep pieces of memory that no longer fit together.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
        with subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
            try:
                code = process.wait(timeout=max(1, task.deadline + GRACE_S - time.time()))
                reason = f"its processes ended with code {code}" if code else "not measured"
            except subprocess.TimeoutExpired:
                # torchrun passes it on to its processes, and kills those that do not obey.
                process.terminate()
                reason = "the time given with --minutes was over"
        lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    found = [Row(**json.loads(line)) for line in lines]
    found += [replace(row, failed=reason) for row in task.rows[len(found) :]]
    for row in found:
        logger.info("%s", json.dumps(asdict(row)))
    return found
