"""One process of the training benchmark: rows that share a model, measured one after another.

python -m llava_ray.bench.train_rows TASK.json; writes a line of JSON per row and process 0.
"""

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed

from llava_ray.bench.train_engines import Engine, EngineName, Setup, make_engine
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.shapes import LLAVA_7B, TINY
from llava_ray.train.batches import Batch

QUESTION_TOKENS = 20
"""Between the image and the caption; with 576 image tokens the caption has 160 of 756."""
WARM_UP, MIN_STEPS, MAX_STEPS, ROW_S = 3, 5, 12, 5.0
CHECK_STEPS = 3
OPTIMIZERS: Mapping[EngineName, str] = {
    "plain": "AdamW, weights and moments in bf16",
    "replica": "AdamW, weights and moments in fp32",
    "zero2": "AdamW, weights and moments in fp32, DeepSpeed ZeRO-2",
    "zero3": "AdamW, weights and moments in fp32, DeepSpeed ZeRO-3",
}


@dataclass
class Row:
    """A line of the table."""

    name: str
    engine: EngineName
    batch: int
    checkpointing: bool | Literal["mlp"] = False
    fused_layers: bool = True
    lora_dropout: float = 0.0
    compile: bool = False
    liger: bool = False
    gpus: int = 1
    launcher: Literal["processes", "ray"] = "processes"
    """`processes` are started as torchrun does, with the ranks in the environment."""
    optimizer: str = ""
    attention: str = "sdpa"
    samples_per_s: float = 0.0
    """Median over steps, of all GPUs together."""
    samples_per_s_min: float = 0.0
    samples_per_s_max: float = 0.0
    steps: int = 0
    peak_bytes: int | None = None
    """Allocated at once by PyTorch on one GPU; None where the device does not say."""
    peak_reserved_bytes: int | None = None
    tflop_per_s: float = 0.0
    """Per GPU, of what must be computed: recomputation is not counted."""
    check_losses: list[float] = field(default_factory=list)
    """Nats per token before each of the process's first steps on a batch that is the same for all
    engines: equal but for rounding."""
    check_grad_norm: float | None = None
    """Of the first of these steps."""
    warm_up_s: float = 0.0
    failed: str = ""
    notes: list[str] = field(default_factory=list)

    def setup(self) -> Setup:
        """Return what the process must be started with."""
        return Setup(self.engine, self.fused_layers, self.lora_dropout, self.compile, self.liger)


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    rows: list[Row]
    tiny: bool
    tokens: int
    out: str
    deadline: float
    """Unix time after which no row is begun."""

    @property
    def shapes(self) -> Mapping[str, Any]:
        """The model's config."""
        return TINY if self.tiny else LLAVA_7B


def make_batch(shapes: Mapping[str, Any], batch: int, tokens: int, device: str) -> Batch:
    """Draw samples of one image, a question and a caption that fills up to `tokens`."""
    vision = shapes["vision_config"]
    size, image_tokens = vision["image_size"], tokens_per_image(shapes)
    draw = torch.Generator().manual_seed(batch)
    ids = torch.randint(5, shapes["image_token_index"], (batch, tokens), generator=draw)
    ids[:, 0], ids[:, 1 : 1 + image_tokens] = 1, shapes["image_token_index"]
    labels = ids.clone()
    labels[:, : 1 + image_tokens + QUESTION_TOKENS - 1] = IGNORE_INDEX
    pixels = torch.randn(batch, 3, size, size, generator=draw)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def tokens_per_image(shapes: Mapping[str, Any]) -> int:
    """Count the patches of an image."""
    vision = shapes["vision_config"]
    patches: int = vision["image_size"] // vision["patch_size"]
    return patches**2


def flop_per_sample(shapes: Mapping[str, Any], tokens: int, lora_r: int) -> float:
    """Count what a LoRA step must compute: no weight gradients of frozen layers, no recomputation.

    A product of T rows with P weights is 2 T P operations; causal attention is half of full.
    """
    text, vision = shapes["text_config"], shapes["vision_config"]
    width, inner, layers = (
        text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"],
    )  # fmt: skip
    linear = layers * (4 * width**2 + 3 * width * inner)
    lora = layers * lora_r * (4 * 2 * width + 3 * (width + inner))
    attention = layers * 2 * tokens**2 * width * 3.5
    sight = (vision["num_hidden_layers"] - 1) * (
        4 * vision["hidden_size"] ** 2 + 2 * vision["hidden_size"] * vision["intermediate_size"]
    )
    captioned = tokens - tokens_per_image(shapes) - QUESTION_TOKENS
    head = 4 * captioned * width * text["vocab_size"]
    seen = 2 * (tokens_per_image(shapes) + 1) * sight
    return float(4 * tokens * linear + 6 * tokens * lora + attention + head + seen)


def measure(row: Row, engine: Engine, task: Task, device: str) -> None:
    """Fill a row's figures in."""
    world = int(os.environ["WORLD_SIZE"])
    gpu = device == "cuda"
    engine.recompute(row.checkpointing)
    batch = make_batch(task.shapes, row.batch, task.tokens, device)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(WARM_UP):
        engine.step(batch)
    _wait(gpu)
    row.warm_up_s = time.perf_counter() - began
    rates: list[float] = []
    began = time.perf_counter()
    # The same number on every process, or collectives would wait forever.
    lap = row.warm_up_s / WARM_UP
    number = max(MIN_STEPS, min(MAX_STEPS, int(ROW_S / lap))) if world == 1 else MAX_STEPS
    for _ in range(number):
        start = time.perf_counter()
        engine.step(batch)
        _wait(gpu)
        rates.append(row.batch * world / (time.perf_counter() - start))
    row.steps = number
    row.samples_per_s = statistics.median(rates)
    row.samples_per_s_min, row.samples_per_s_max = min(rates), max(rates)
    if gpu:
        row.peak_bytes = torch.cuda.max_memory_allocated()
        row.peak_reserved_bytes = torch.cuda.max_memory_reserved()
    operations = flop_per_sample(task.shapes, task.tokens, 48)
    row.tflop_per_s = row.samples_per_s / world * operations / 1e12
    row.optimizer = OPTIMIZERS[row.engine]


def check(engine: Engine, task: Task, device: str) -> tuple[list[float], float]:
    """Take the first steps on a batch of two; return the losses, and the first gradient's norm."""
    batch = make_batch(task.shapes, 2, task.tokens, device)
    steps = [engine.step(batch) for _ in range(CHECK_STEPS)]
    return [float(loss) for loss, _ in steps], float(steps[0][1])


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def run(task: Task) -> None:
    """Measure all rows; a failing one is recorded with its reason and the rest go on."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own_group = world > 1 and not torch.distributed.is_initialized()
    if own_group:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    checked: tuple[list[float], float | None] = ([], None)
    engine: Engine | None = None
    broken = ""
    for row in task.rows:
        row.gpus = world
        try:
            if broken or time.time() > task.deadline:
                raise TimeoutError(broken or "not begun: the time given with --minutes was over")
            if engine is None:
                broken = "the model or its engine could not be made, see the first such row"
                engine = make_engine(row.setup(), task.shapes, device)
                checked = check(engine, task, device)
                broken = ""
            row.check_losses, row.check_grad_norm = checked
            measure(row, engine, task, device)
        except Exception as error:
            traceback.print_exc()
            row.failed = traceback.format_exception_only(error)[-1].strip()[:300]
        if rank == 0:
            with Path(task.out).open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(row)) + "\n")
            print(f"{row.name}: {row.failed or f'{row.samples_per_s:.2f} samples/s'}", flush=True)
        for parameter in getattr(engine, "trained", []):
            parameter.grad = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if own_group:
        torch.distributed.destroy_process_group()


def read_task(path: Path) -> Task:
    """Read what `bench` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Task(**{**tree, "rows": [Row(**row) for row in tree["rows"]]})


if __name__ == "__main__":
    run(read_task(Path(sys.argv[1])))
