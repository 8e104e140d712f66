"""Memory of a training run before it is started, from the config and the model's shapes alone.

Counts what PyTorch allocates at the fullest moment, when backward begins. What the driver, NCCL
and the allocator's unused pieces take is left out: leave 1 to 2 GB beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.config.run import ModelConfig, RunConfig, TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.shapes import LLAVA_7B
from llava_ray.models.sizes import Sizes

CAPTION_TOKENS, QUESTION_TOKENS = 160, 20
"""Tokens of an average sample of the article's data, where --tokens does not say otherwise."""

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "auto": 2}
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Blocks of 64 with 8-bit scales, themselves scaled in blocks of 256 (QLoRA, section 3)."""

BUCKET = 50_000_000
"""Gradient entries sent at once; there are two such buffers, since sending overlaps computing."""

LIVE_WEIGHTS = 1_000_000_000
"""Weights that ZeRO-3 holds whole at a time (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker."""

    weights: float
    """The frozen and the trained, as forward reads them."""
    gradients: float
    optimizer: float
    """fp32 weights, and AdamW's two moments."""
    activations: float
    """What forward keeps for backward."""
    workspace: float
    """What one layer, the head and DeepSpeed's buffers need besides."""
    host: float
    """What lies in the machine's memory instead, where the config offloads."""

    @property
    def gpu(self) -> float:
        """All that lies on the GPU at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def shapes_of(model: ModelConfig) -> Mapping[str, Any]:
    """Return a model's config.json: from its folder, or the table's for llava-1.5-7b-hf.

    Raises ConfigError for another model that is not on this machine.
    """
    folder = EMBEDDED if model.path == "embedded" else Path(model.path).expanduser()
    path = folder / "config.json"
    if path.is_file():
        family_of(folder)  # Says what is wrong with a damaged one.
        return dict(json.loads(path.read_text(encoding="utf-8")))
    if model.path == "llava-hf/llava-1.5-7b-hf":
        return LLAVA_7B
    raise ConfigError(
        f"model.path {model.path!r}: no config.json there; estimates need a folder, 'embedded' or "
        "llava-hf/llava-1.5-7b-hf"
    )


def default_load(sizes: Sizes, train: TrainConfig) -> int:
    """Count the tokens of a sample with question and caption of usual length."""
    return min(train.max_length, sizes.image_tokens + QUESTION_TOKENS + CAPTION_TOKENS)


def estimate(sizes: Sizes, train: TrainConfig, *, workers: int, load: int) -> Memory:
    """Return the memory of one of so many workers.

    load: tokens of a sample, image tokens counted in, with a question of usual length.
    """
    train = train.model_copy(update={"zero_stage": train.stage_for(workers)})
    width = DTYPE_BYTES[train.precision]
    trained = trained_weights(sizes, train)
    full = train.method == "full"
    frozen = sizes.vision_tower() * width if full else _frozen_bytes(sizes, train, width)
    whole = frozen + trained * width
    share = workers if train.zero_stage == 3 else 1
    weights = whole / share
    workspace = 2.0 * BUCKET * width if train.zero_stage else 0.0
    if train.zero_stage == 3 and workers > 1:
        workspace += min(whole - weights, LIVE_WEIGHTS * width)
    # Beside the moments DeepSpeed keeps a copy of the weights, also where they are in fp32.
    gradients, optimizer = trained * width / workers, trained * 12 / workers
    if train.zero_stage == 0:
        gradients = trained * width
        if train.optimizer == "adamw" and width < 4 and train.gradient_accumulation > 1:
            # Those of earlier micro-batches wait in fp32.
            gradients += trained * 4
        optimizer = (
            trained * {"adamw": 12.0, "adamw8bit": 2.0, "galore": 2.0 * width}[train.optimizer]
        )
    host = 0.0
    if train.offload != "none":
        host, optimizer, gradients = optimizer + gradients, 0.0, 0.0
    if train.offload == "optimizer+weights":
        host, weights = host + weights, 0.0
        workspace += min(whole, LIVE_WEIGHTS * width)
    activations, layer = activation_bytes(sizes, train, train.batch_size * load, width)
    captioned = train.batch_size * max(1, load - sizes.image_tokens - QUESTION_TOKENS)
    # Of head and cross entropy: logits, their fp32 copy, and gradients of both.
    head = float(captioned * sizes.vocabulary * (2 * width + 12))
    workspace += max(layer, head)
    return Memory(weights, gradients, optimizer, activations, workspace, host)


def trained_weights(sizes: Sizes, train: TrainConfig) -> int:
    """Count what the optimizer changes."""
    projector = sizes.projector() if train.projector_learning_rate > 0 else 0
    if train.method == "full":
        return sizes.language_model() + projector
    return sizes.lora(train.lora_r, train.lora_targets) + projector


def _frozen_bytes(sizes: Sizes, train: TrainConfig, width: int) -> float:
    """Count the base; the projector belongs to what is trained, if it is."""
    linear = sizes.layers * sizes.layer_linear()
    rest = sizes.total() - linear
    if train.projector_learning_rate > 0:
        rest -= sizes.projector()
    return linear * base_bits(train, width) / 8 + rest * width


def base_bits(train: TrainConfig, width: int) -> float:
    """Return the bits that a frozen linear weight of the language model takes."""
    if train.method == "hqq":
        # An fp16 scale and zero point per group; ten 3-bit weights lie in an int32.
        return (3.2 if train.hqq_bits == 3 else train.hqq_bits) + 32 / train.hqq_group_size
    return NF4_BITS if train.method == "qlora" else 8.0 * width


def activation_bytes(
    sizes: Sizes, train: TrainConfig, tokens: int, width: int
) -> tuple[float, float]:
    """Return what all layers keep, and what the one under way needs besides."""
    h, i, kv = sizes.hidden, sizes.inner, sizes.kv_width
    lora = 0 if train.method == "full" else train.lora_r
    fused = train.runs_fused and not train.use_dora
    attention = width * (2 * h + 2 * kv) + 4 * sizes.heads
    # Besides attention and the gated unit: fused layers keep the inputs of both norms; peft's
    # modules also both norms' outputs, and the norms' inputs once more in fp32.
    full = {
        True: width * (2 * h + 2 * i + 7 * lora) + attention,
        False: width * (2 * h + 4 * i + 7 * lora) + attention + 8 * h,
    }[fused]
    kept: float = full
    under_way = width * (4 * i + 4 * h) if fused else width * (3 * i + 4 * h)
    if train.gradient_checkpointing:
        recomputed = width * (2 * i + 2 * lora)
        if fused and train.gradient_checkpointing == "mlp":
            kept, under_way = full - recomputed, under_way + recomputed
        else:
            kept = width * (2 if fused else 1) * h
            under_way += full - kept
    return float(tokens * sizes.layers * kept), float(tokens * under_way)


def alternatives(train: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Return the configured run and others like it, by name."""

    def but(**changes: Any) -> TrainConfig:
        return train.model_copy(update=changes)

    whole: dict[str, Any] = {"method": "lora", "use_dora": False, "optimizer": "adamw"}
    return [
        ("as configured", train),
        ("gradient checkpointing", but(gradient_checkpointing=True)),
        ("ZeRO-2", but(zero_stage=2, offload="none")),
        ("ZeRO-3", but(zero_stage=3, **whole)),
        ("ZeRO-3, all offloaded", but(zero_stage=3, offload="optimizer+weights", **whole)),
        ("8-bit AdamW", but(optimizer="adamw8bit", zero_stage=0, offload="none")),
        ("nf4 base", but(method="qlora", zero_stage=2, offload="none")),
        ("HQQ 2-bit base", but(method="hqq", hqq_bits=2, zero_stage=2, offload="none")),
        ("fp32", but(precision="fp32", **whole)),
        (f"rank {max(1, train.lora_r // 2)}", but(lora_r=max(1, train.lora_r // 2))),
        ("full fine-tune, ZeRO-3", but(method="full", zero_stage=3)),
    ]


def run(config: RunConfig, *, workers: int, tokens: int | None = None) -> str:
    """Return a table of the configured run beside other ways to run it.

    Raises ConfigError when the model's shapes are unknown.
    """
    sizes = Sizes.of(shapes_of(config.model))
    train = config.train
    load = tokens or default_load(sizes, train)
    trained = trained_weights(sizes, train)

    def lora(everywhere: bool) -> str:
        count = sizes.lora(train.lora_r, train.lora_targets, in_vision_tower=everywhere)
        return f"{count:,} of {sizes.total() + count:,}"

    lines = [
        f"{config.model.path}: {sizes.total():,} parameters, {trained:,} trained",
        f"LoRA alone: {lora(False)}; with the vision tower's layers of the same names, which "
        f"peft's short names also match: {lora(True)}",
        f"AdamW on all, (8 + 4 + 4) bytes each: {sizes.total() * 16 / 2**30:.2f} GiB in fp32, "
        f"{sizes.total() * 8 / 2**30:.2f} GiB in half precision",
        f"GB per worker of {workers}, batch {train.batch_size}, {load} tokens:",
        f"{'':26}{'weights':>9}{'grads':>9}{'AdamW':>9}{'activ.':>9}{'work':>9}{'GPU':>9}{'host':>9}",
    ]
    for name, other in alternatives(train):
        memory = estimate(sizes, other, workers=workers, load=load)
        parts = (
            memory.weights, memory.gradients, memory.optimizer, memory.activations,
            memory.workspace, memory.gpu, memory.host,
        )  # fmt: skip
        lines.append(f"{name:26}" + "".join(f"{part / 1e9:9.2f}" for part in parts))
    return "\n".join(lines)
