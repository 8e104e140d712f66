"""Speed and memory of LoRA training beside plain transformers + peft, from one run.

LLaVA-1.5-7B's shapes with random weights, r=48 on all linear layers of the language model, the
projector trained. Rows of one kind share processes; processes that die cost only their own rows.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
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
    "plain-b4", "plain-b8", "plain-ckpt-b8", "replica-b4", "replica-b8", "replica-b16",
    "replica-ckpt-b8", "zero2-b4", "zero2-b8", "zero2-b16", "zero2-ckpt-b8",
)  # fmt: skip
"""What is measured where no rows are asked for; `parse_row` knows more, as the article's flags,
zero3-fp16-accum4-ckpt-b1."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ckpt": {"checkpointing": True},
    "mlp": {"checkpointing": "mlp"},
    "dropout": {"lora_dropout": 0.05},
    "peft": {"fused_layers": False},
    "liger": {"liger": True},
    "compile": {"compile": True},
    "fp16": {"fp16": True},
    "accum4": {"accumulation": 4},
}
"""By the word in a row's name."""


def parse_row(name: str) -> Row:
    """Read a name such as `replica-ckpt-b8`: an engine, options, and samples per GPU.

    Raises ConfigError for another name.
    """
    engine, *options, batch = name.split("-")
    known = engine in get_args(EngineName) and OPTIONS.keys() >= set(options)
    if not known or batch[:1] != "b" or not batch[1:].isdigit():
        raise ConfigError(
            f"--only {name!r}: no such row; a name is one of {', '.join(get_args(EngineName))}, "
            f"then any of {', '.join(OPTIONS)}, then b and a number, joined by '-'"
        )
    changes = {key: value for option in options for key, value in OPTIONS[option].items()}
    return Row(name, engine, int(batch[1:]), **changes)  # type: ignore[arg-type]


def run(
    out: Path, *, only: Sequence[str] = (), minutes: float = 5, gpus: Iterable[int] = (1,),
    tiny: bool = False,
) -> None:  # fmt: skip
    """Measure rows of these names and write JSON after those of each kind."""
    start, rows = time.time(), list[Row]()
    chosen = [parse_row(name) for name in only or ROWS]
    tokens, device = 40 if tiny else 756, "cuda" if torch.cuda.is_available() else "cpu"
    kinds: dict[Any, list[Row]] = {}
    for row in chosen:
        kinds.setdefault(row.kind(), []).append(row)
    for world in gpus:
        for kind in kinds.values():
            given = [replace(row, gpus=world) for row in kind]
            task = Task(given, tiny, tokens, deadline=start + minutes * 60)
            rows += measure(task, world)
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


def measure(task: Task, world: int) -> list[Row]:
    """Run one process per GPU over a task's rows; rows that it does not reach have failed."""
    with tempfile.TemporaryDirectory(prefix="llava_ray_bench_") as name:
        given, written = Path(name) / "task.json", Path(name) / "rows.jsonl"
        given.write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--local-addr=127.0.0.1", f"--nproc-per-node={world}", "-m",
            "llava_ray.bench.train_rows", str(given), str(written),
        ]  # fmt: skip
        # Row by row PyTorch would else keep pieces of memory that no longer fit together.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
        with subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
            try:
                code = process.wait(timeout=max(1, task.deadline + GRACE_S - time.time()))
                reason = f"torchrun ended with code {code}" if code else "not measured"
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
