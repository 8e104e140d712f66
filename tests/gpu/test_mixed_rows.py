"""C10 on a GPU: rows without a picture, with one and with two train in every way alike.

With LLAVA_RAY_SLOW=1 it writes jobs/results/mixed_rows_h100.json.
"""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import config_for, mixed, small_model  # noqa: E402

from llava_ray.bench.results import write  # noqa: E402
from llava_ray.train.worker import DistributedContext, Loop, WorkerTask  # noqa: E402

PLAIN = (
    "train.max_steps=6", "train.lora_dropout=0", "train.warmup_ratio=0", "train.batch_size=1",
    "train.learning_rate=1e-2", "train.max_grad_norm=1000", "train.log_every_steps=1",
    "train.group_by_modality_length=false", "train.loader_workers=0",
)  # fmt: skip
WAYS = {
    "modules": ("train.zero_stage=0", "train.fused_layers=false"),
    "fused": ("train.zero_stage=0",),
    "zero2": ("train.zero_stage=2",),
    "zero3": ("train.zero_stage=3",),
}
BF16_TOLERANCE = 2e-3
RESULTS = Path(__file__).parents[2] / "jobs" / "results" / "mixed_rows_h100.json"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "DS_ACCELERATOR": "cuda",
    }  # fmt: skip
    torch.distributed.init_process_group("nccl")
    yield
    torch.distributed.destroy_process_group()


def test_mixed_rows_train_alike_in_every_way(one_rank: None, tmp_path: Path) -> None:
    model, data = small_model(tmp_path / "model"), mixed(tmp_path / "store")
    rows: list[dict[str, Any]] = []
    for way, settings in WAYS.items():
        config = config_for(tmp_path / "store", model, *PLAIN, *settings)
        task = WorkerTask(run_id=way, config=config, dataset=data, live_folder=None)
        context = DistributedContext(0, 1, torch.device("cuda"), lambda values, folder: None)
        loop = Loop(task, context, None)
        loop.run()
        losses = [line["loss"] for line in loop.metrics if "loss" in line]
        assert len(losses) == 6
        assert losses == pytest.approx(rows[0]["losses"] if rows else losses, rel=BF16_TOLERANCE)
        rows.append({"way": way, "settings": settings, "losses": losses})
    if "LLAVA_RAY_SLOW" in os.environ:
        command = "LLAVA_RAY_SLOW=1 python -m pytest tests/gpu/test_mixed_rows.py"
        write(RESULTS, "mixed_rows_h100", {"command": command, "rows": rows}, "cuda")
