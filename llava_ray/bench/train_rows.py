"""One process of the training benchmark: rows that share a model, measured one after another.

torchrun -m llava_ray.bench.train_rows TASK.json ROWS.jsonl, or python -m … and the number of
workers that Ray Train starts; process 0 writes a line per row.
Each engine trains the same random model on the same batches with AdamW and gradient clipping.
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
from torch import nn

from llava_ray.config.run import TrainConfig
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.shapes import LLAVA_7B, TINY, random_model
from llava_ray.models.sizes import Sizes
from llava_ray.models.tensors import wait_for
from llava_ray.train import adapt, zero
from llava_ray.train.batches import Batch
from llava_ray.train.estimate import QUESTION_TOKENS
from llava_ray.train.replica import ReplicaEngine

WARM_UP_STEPS, STEPS, CHECK_STEPS = 3, 8, 3
LORA_R = 48
EngineName = Literal["plain", "replica", "zero2", "zero3"]
"""transformers + peft; and the product without DeepSpeed (train.zero_stage=0) and with it."""
STAGES: Mapping[EngineName, Literal[0, 2, 3]] = {"plain": 0, "replica": 0, "zero2": 2, "zero3": 3}
Checkpointing = bool | Literal["mlp"]


@dataclass
class Row:
    """A line of the table."""

    name: str
    engine: EngineName
    batch: int
    checkpointing: Checkpointing = False
    fused_layers: bool = True
    lora_dropout: float = 0.0
    compile: bool = False
    liger: bool = False
    fp16: bool = False
    accumulation: int = 1
    """Batches of a step."""
    ray: bool = False
    """Whether Ray Train started the processes, not torchrun."""
    gpus: int = 1
    samples_per_s: float = 0.0
    """Median over steps, of all GPUs together."""
    samples_per_s_min: float = 0.0
    samples_per_s_max: float = 0.0
    peak_bytes: int | None = None
    """Allocated at once by PyTorch on one GPU; None where the device does not say."""
    tflop_per_s: float = 0.0
    """Per GPU, of what must be computed: recomputation is not counted."""
    check_losses: list[float] = field(default_factory=list)
    """Nats per token before each of the process's first steps on a batch that is the same for all
    engines: equal but for rounding. A compiled row has its own batch."""
    check_grad_norm: float | None = None
    """Of the first of these steps."""
    warm_up_s: float = 0.0
    failed: str = ""

    def kind(self) -> tuple[Any, ...]:
        """Return what the process must be started with."""
        return (
            self.engine,
            self.fused_layers,
            self.lora_dropout,
            self.compile,
            self.liger,
            self.fp16,
            self.accumulation,
            self.ray,
            self.gpus,
        )

    def train(self, checkpointing: Checkpointing = False) -> TrainConfig:
        """Return the train section that the product would run with."""
        stage = STAGES[self.engine]
        return TrainConfig(
            lora_r=LORA_R, lora_alpha=256, lora_dropout=self.lora_dropout,
            fused_layers=self.fused_layers, zero_stage=stage,
            precision="fp16" if self.fp16 else "bf16", gradient_checkpointing=checkpointing,
            gradient_accumulation=self.accumulation,
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a process is given."""

    rows: list[Row]
    tiny: bool
    tokens: int
    deadline: float
    """Unix time after which no row is started."""

    @property
    def shapes(self) -> Mapping[str, Any]:
        """The model's config."""
        return TINY if self.tiny else LLAVA_7B


class Plain:
    """transformers' own loss over peft's layers, in a loop as Hugging Face's examples write it."""

    def __init__(self, model: Any, row: Row) -> None:
        from peft import LoraConfig, get_peft_model

        train = row.train()
        config = LoraConfig(
            r=train.lora_r,
            lora_alpha=train.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=train.lora_dropout,
            target_modules=adapt.lora_pattern(train.lora_targets),
        )
        # LoRA in the base's precision is the fastest that peft offers.
        self.base, self.model = model, get_peft_model(model, config, autocast_adapter_dtype=False)
        model.model.multi_modal_projector.requires_grad_(True)
        self.model.train()
        groups = adapt.parameter_groups(self.model, train)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=model.device.type == "cuda")
        self.forward: Any = torch.compile(self.model) if row.compile else self.model

    def recompute(self, checkpointing: Checkpointing) -> None:
        """Checkpoint whole layers, or nothing; forget gradients that a failed row left."""
        adapt.set_checkpointing(self.base, on=bool(checkpointing))
        self.optimizer.zero_grad()

    def step(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Train on a batch; return the loss per supervised token and the gradient's norm."""
        loss = self.forward(**batch, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm


class Product:
    """The product's model, loss and engine, stepped as its worker does."""

    def __init__(self, model: Any, row: Row) -> None:
        self.row, self.base, train = row, model, row.train()
        gpu = model.device.type == "cuda"
        zero.prepare_environment(gpu=gpu)
        loss = adapt.loss_module(adapt.adapt(model, train), train)
        groups = adapt.parameter_groups(loss, train)
        self.engine: Any
        if train.zero_stage == 0:
            self.engine = ReplicaEngine(loss, groups, train, model.dtype)
        else:
            precision: zero.Precision = ("fp16" if row.fp16 else "bf16") if gpu else "fp32"
            config = zero.zero_config(train, precision, gpu=gpu)
            self.engine = zero.make_engine(loss, groups, config)

    def recompute(self, checkpointing: Checkpointing) -> None:
        """Choose what backward computes again, by the product's config key."""
        loss = self.engine.module
        for layer in loss.decoder.layers if loss.decoder else ():
            layer.recompute = adapt.RECOMPUTE[checkpointing]
        adapt.set_checkpointing(self.base, on=loss.decoder is None and bool(checkpointing))

    def step(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Train on a batch; return the loss per supervised token and the gradient's norm."""
        for _ in range(self.row.accumulation):
            loss = self.engine(**batch) / (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            self.engine.backward(loss)
            self.engine.step()
        return loss.detach(), self.engine.get_global_grad_norm()


def make_engine(row: Row, shapes: Mapping[str, Any], device: str) -> Plain | Product:
    """Build a model and the loop around it."""
    if row.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llava

        apply_liger_kernel_to_llava()
    model = random_model(shapes, device, _dtype(row, device))
    return Plain(model, row) if row.engine == "plain" else Product(model, row)


def _dtype(row: Row, device: str) -> torch.dtype:
    """Return the dtype of weights and pixels."""
    if device != "cuda":
        return torch.float32
    return torch.float16 if row.fp16 else torch.bfloat16


def make_batch(task: Task, row: Row, batch: int, device: str) -> Batch:
    """Draw samples of one image, a question and a caption that fills up to `task.tokens`."""
    shapes, size = task.shapes, task.shapes["vision_config"]["image_size"]
    image_tokens = Sizes.of(shapes).image_tokens
    draw = torch.Generator().manual_seed(batch)
    ids = torch.randint(5, shapes["image_token_index"], (batch, task.tokens), generator=draw)
    ids[:, 0], ids[:, 1 : 1 + image_tokens] = 1, shapes["image_token_index"]
    labels = ids.clone()
    labels[:, : 1 + image_tokens + QUESTION_TOKENS - 1] = IGNORE_INDEX
    pixels = torch.randn(batch, 3, size, size, generator=draw)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
        "pixel_values": pixels.to(device, _dtype(row, device)),
    }


def flop_per_sample(shapes: Mapping[str, Any], tokens: int) -> float:
    """Count what a LoRA step must compute: no weight gradients of frozen layers, no recomputation.

    A product of T rows with P weights is 2 T P operations; causal attention is half of full.
    """
    sizes = Sizes.of(shapes)
    linear = 4 * tokens * sizes.layers * sizes.layer_linear()
    lora = 6 * tokens * sizes.lora(LORA_R, list(sizes.linears()))
    attention = sizes.layers * 2 * tokens**2 * sizes.hidden * 3.5
    captioned = tokens - sizes.image_tokens - QUESTION_TOKENS
    head = 4 * captioned * sizes.hidden * sizes.vocabulary
    vision_layer = 4 * sizes.vision_hidden**2 + 2 * sizes.vision_hidden * sizes.vision_inner
    vision = 2 * (sizes.image_tokens + 1) * (sizes.vision_layers - 1) * vision_layer
    return linear + lora + attention + head + vision


def measure(row: Row, engine: Plain | Product, task: Task, device: str) -> None:
    """Fill a row's figures in; every process takes the same steps, or collectives would hang."""
    engine.recompute(row.checkpointing)
    batch = make_batch(task, row, row.batch, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(WARM_UP_STEPS + STEPS):
        start = time.perf_counter()
        engine.step(batch)
        wait_for(device)
        times.append(time.perf_counter() - start)
    row.warm_up_s = sum(times[:WARM_UP_STEPS])
    rates = [row.batch * row.accumulation * row.gpus / seconds for seconds in times[WARM_UP_STEPS:]]
    row.samples_per_s = statistics.median(rates)
    row.samples_per_s_min, row.samples_per_s_max = min(rates), max(rates)
    if device == "cuda":
        row.peak_bytes = torch.cuda.max_memory_allocated()
    operations = flop_per_sample(task.shapes, task.tokens)
    row.tflop_per_s = row.samples_per_s / row.gpus * operations / 1e12


def run(task: Task, out: Path) -> None:
    """Measure all rows; a failing one is recorded with its reason and the rest go on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # Ray shows a process its own GPU alone.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    under_ray = torch.distributed.is_initialized()
    if not under_ray:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    engine: Plain | Product | None = None
    losses: list[float] = []
    norm: float | None = None
    for row in task.rows:
        try:
            if time.time() > task.deadline:
                raise TimeoutError("not started: the time given with --minutes was over")
            if engine is None:
                made = make_engine(row, task.shapes, device)
                # Another batch size would be compiled once more, for minutes.
                batch = make_batch(task, row, row.batch if row.compile else 2, device)
                steps = [made.step(batch) for _ in range(CHECK_STEPS)]
                losses, norm = [float(loss) for loss, _ in steps], float(steps[0][1])
                engine = made
            row.check_losses, row.check_grad_norm = losses, norm
            measure(row, engine, task, device)
        except Exception as error:
            traceback.print_exc()
            row.failed = traceback.format_exception_only(error)[-1].strip()[:300]
        if int(os.environ["RANK"]) == 0:
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if not under_ray:
        torch.distributed.destroy_process_group()


def run_under_ray(task: Task, out: Path, world: int) -> None:
    """Measure all rows in as many workers of Ray Train."""
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=world, include_dashboard=False)
    trainer = TorchTrainer(
        lambda: run(task, out),
        scaling_config=ray.train.ScalingConfig(
            num_workers=world, use_gpu=torch.cuda.is_available()
        ),
        run_config=ray.train.RunConfig(storage_path=str(out.parent)),
    )
    trainer.fit()


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    asked = Task(**{**given, "rows": [Row(**row) for row in given["rows"]]})
    if len(sys.argv) > 3:
        run_under_ray(asked, Path(sys.argv[2]), int(sys.argv[3]))
    else:
        run(asked, Path(sys.argv[2]))
