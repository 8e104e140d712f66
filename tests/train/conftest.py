"""Training runs of a few steps on one and two ranks, made once and looked at by many tests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config_for, mixed, small_model, squares

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.config.run import RunConfig
from llava_ray.train.worker import WorkerTask

Runs = dict[str, Path]


def run_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run jobs one after another on a number of ranks and wait for all."""
    path = folder / f"jobs_{world_size}.json"
    path.write_text(json.dumps(jobs, default=str))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    root = Path(__file__).parents[2]
    logs = [(folder / f"log_{world_size}_{rank}").open("w") for rank in range(world_size)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(port), str(path)],
            stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(root)},
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    codes = [process.wait(timeout=400) for process in ranks]
    for log in logs:
        log.close()
    assert codes == [0] * world_size, Path(logs[0].name).read_text()[-3000:]


class Bench:
    """A small model and data set, and runs over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = small_model(root / "model")
        self.dataset = squares(root / "store")
        self.mixed = mixed(root / "store")

    def config(self, *overrides: str) -> RunConfig:
        return config_for(self.root / "store", self.model, *overrides)

    def job(
        self,
        name: str,
        *overrides: str,
        resume_from: Path | None = None,
        dataset: DatasetRecord | None = None,
    ) -> dict[str, Any]:
        config = self.config(*overrides)
        task = WorkerTask(
            run_id=name, config=config, dataset=dataset or self.dataset, live_folder=None
        )
        out = self.root / name
        return {"task": task.model_dump(mode="json"), "resume_from": resume_from, "out": out}


PLAIN = (
    "train.max_steps=3", "train.checkpoint_every_steps=1", "train.lora_dropout=0",
    "train.warmup_ratio=0", "train.lr_scheduler=linear", "train.learning_rate=1e-2",
    "train.projector_learning_rate=1e-3", "train.max_grad_norm=1000",
)  # fmt: skip
"""Without dropout and clipping, so that AdamW's first moment shows the gradient itself."""

MIXED = ("train.max_steps=4", "train.group_by_modality_length=false")
"""So that one rank has text alone while the other has pictures."""
LONG = (
    "train.max_steps=4", "train.checkpoint_every_steps=2", "train.gradient_accumulation=2",
    "train.lora_dropout=0.2", "train.learning_rate=1e-2", "train.weight_decay=0.1",
)  # fmt: skip


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def runs(bench: Bench) -> Path:
    """The folder with all runs; `one_*` had one rank, `two_*` two."""
    one, two = "train.batch_size=2", "train.batch_size=1"
    stage2, stage3 = "train.zero_stage=2", "train.zero_stage=3"
    stage0, full = "train.zero_stage=0", "train.method=full"
    eight_bit = (*LONG, full, stage0, two, "train.optimizer=adamw8bit", "train.learning_rate=1e-3")
    galore = (
        *LONG, full, stage0, two, "train.optimizer=galore", "train.learning_rate=1e-3",
        "train.galore_rank=4", "train.galore_update_steps=3",
    )  # fmt: skip
    tail = (stage0, two, "train.max_steps=20", "train.epochs=2")
    unlogged = "train.log_every_steps=1000"
    two_at_2 = bench.root / "two_long" / "step_2"
    run_ranks(
        2,
        [
            bench.job("two_zero2", *PLAIN, two, stage2),
            bench.job("two_zero3", *PLAIN, two, stage3),
            *(
                bench.job(f"two_mixed{stage[-1]}", *PLAIN, *MIXED, two, stage, dataset=bench.mixed)
                for stage in (stage2, stage3, stage0)
            ),
            bench.job("two_long", *LONG, two, stage2),
            bench.job("two_resumed", *LONG, two, stage2, resume_from=two_at_2),
            bench.job("two_stage0", *PLAIN, two, stage0),
            bench.job("two_8bit", *eight_bit),
            bench.job("two_8bit_resumed", *eight_bit, resume_from=bench.root / "two_8bit/step_2"),
            bench.job("two_galore", *galore),
            bench.job("two_galore_resumed", *galore, resume_from=bench.root / "two_galore/step_2"),
            bench.job("two_tail", *tail, "train.checkpoint_every_steps=19"),
            bench.job("two_tail_unlogged", *tail, unlogged),
            bench.job("two_tail_resumed", *tail, resume_from=bench.root / "two_tail" / "step_19"),
            bench.job("two_diverged", stage0, two, unlogged, "train.max_steps=10",
                      "train.checkpoint_every_steps=1000", "train.warmup_ratio=0",
                      "train.learning_rate=1e18"),
        ],
        bench.root,
    )  # fmt: skip
    run_ranks(
        1,
        [
            bench.job("one_zero2", *PLAIN, one, stage2),
            bench.job("one_zero3", *PLAIN, one, stage3, "train.gradient_checkpointing=true"),
            bench.job("one_dropout", *PLAIN, one, stage2, "train.lora_dropout=0.5"),
            bench.job("one_dropout_zero3", *PLAIN, one, stage3, "train.lora_dropout=0.5"),
            bench.job("one_from_two", *PLAIN, one, stage3,
                      resume_from=bench.root / "two_zero2" / "step_1"),
            bench.job("one_stage0_from_two", *PLAIN, one, stage0,
                      resume_from=bench.root / "two_zero2" / "step_1"),
            bench.job("one_bf16", *PLAIN, one, stage0, "train.precision=bf16"),
            bench.job("one_bf16_resumed", *PLAIN, one, stage0, "train.precision=bf16",
                      resume_from=bench.root / "one_bf16" / "step_2"),
            bench.job("one_zero2_from_stage0", *PLAIN, one, stage2,
                      resume_from=bench.root / "one_stage0_from_two" / "step_2"),
        ],
        bench.root,
    )  # fmt: skip
    return bench.root
