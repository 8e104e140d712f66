"""Training steps that the benchmark times: plain transformers + peft, and this project's.

Each engine trains the same random model on the same batches with AdamW and gradient clipping.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import nn

from llava_ray.config.run import TrainConfig
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.shapes import random_model
from llava_ray.train import adapt, zero
from llava_ray.train.batches import Batch
from llava_ray.train.replica import ReplicaEngine

EngineName = Literal["plain", "replica", "zero2", "zero3"]
"""transformers + peft; and the product without DeepSpeed (train.zero_stage=0) and with it."""


STAGES: Mapping[EngineName, Literal[0, 2, 3]] = {"plain": 0, "replica": 0, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class Setup:
    """What rows of one process share."""

    engine: EngineName
    fused: bool = True
    dropout: float = 0.0
    compile: bool = False
    liger: bool = False

    def train(self, checkpointing: bool | Literal["mlp"]) -> TrainConfig:
        """Return the train section that the product would run with."""
        return TrainConfig(
            lora_r=48, lora_alpha=256, lora_dropout=self.dropout, fused_layers=self.fused,
            zero_stage=STAGES[self.engine], precision="bf16",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip


class Engine(Protocol):
    """A model that can be stepped."""

    def recompute(self, checkpointing: bool | Literal["mlp"]) -> None:
        """Choose what backward computes again from now on."""

    def step(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Train on a batch; return the loss per supervised token and the gradient's norm."""


def make_engine(setup: Setup, shapes: Mapping[str, Any], device: str) -> Engine:
    """Build a model and the loop around it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if setup.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llava

        apply_liger_kernel_to_llava()
    model = random_model(shapes, device, dtype)
    if setup.engine == "plain":
        return Plain(model, setup, dtype)
    return Product(model, setup)


def supervised(batch: Batch) -> int:
    """Count the tokens of a batch that carry a loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


class Plain:
    """transformers' own loss over peft's layers, in a loop as Hugging Face's examples write it."""

    def __init__(self, model: Any, setup: Setup, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model

        train = setup.train(False)
        config = LoraConfig(
            r=train.lora_r,
            lora_alpha=train.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=setup.dropout,
            target_modules=adapt.lora_pattern(train.lora_targets),
        )
        # LoRA in the base's precision is the fastest that peft offers.
        self.base, self.model = model, get_peft_model(model, config, autocast_adapter_dtype=False)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.requires_grad_(True)
        self.model.train()
        self.trained = cast_trained(self.model, dtype)
        self.optimizer = adamw(self.model, train)
        self.forward: Any = torch.compile(self.model) if setup.compile else self.model

    def recompute(self, checkpointing: bool | Literal["mlp"]) -> None:
        """Checkpoint whole layers, or nothing."""
        adapt.set_checkpointing(self.base, on=bool(checkpointing))

    def step(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Train on a batch."""
        loss = self.forward(**batch, use_cache=False).loss
        loss.backward()
        norm = finish(self.trained, self.optimizer)
        return loss.detach(), norm


class Product:
    """The product's model, loss and engine, stepped as its worker does."""

    def __init__(self, model: Any, setup: Setup) -> None:
        self.setup, self.base, train = setup, model, setup.train(False)
        gpu = model.device.type == "cuda"
        zero.prepare_environment(gpu=gpu)
        loss = adapt.loss_module(adapt.adapt(model, train), train)
        groups = adapt.parameter_groups(loss, train)
        self.engine: Any
        if train.zero_stage == 0:
            self.engine = ReplicaEngine(loss, groups, train, model.dtype)
        else:
            config = zero.zero_config(train, "bf16" if gpu else "fp32", gpu=gpu)
            self.engine = zero.make_engine(loss, groups, config)
        self.engine.train()

    def recompute(self, checkpointing: bool | Literal["mlp"]) -> None:
        """Choose by the product's config key."""
        set_recompute(self.engine.module, self.base, self.setup, checkpointing)

    def step(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Train on a batch."""
        loss = self.engine(**batch) / supervised(batch)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach(), self.engine.get_global_grad_norm()


def set_recompute(
    loss: nn.Module, base: Any, setup: Setup, checkpointing: bool | Literal["mlp"]
) -> None:
    """Change what the product's loss module computes again in backward."""
    decoder = adapt.fused_decoder(adapt.base_of(loss.model), setup.train(checkpointing))  # type: ignore[arg-type]
    loss.decoder = decoder
    adapt.set_checkpointing(base, on=decoder is None and bool(checkpointing))


def cast_trained(model: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Hold what is trained in a dtype, and return it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(dtype)
    return trained


def adamw(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Return PyTorch's fastest AdamW, with the projector's own rate."""
    groups = adapt.parameter_groups(model, train)
    return torch.optim.AdamW(groups, fused=groups[0]["params"][0].is_cuda)


def finish(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Clip, step and forget the gradients; return their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm
