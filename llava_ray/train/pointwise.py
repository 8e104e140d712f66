"""What lies between the matrix products of a LLaMA layer, forward and backward.

Plain PyTorch; on a GPU each function is compiled into one kernel, so that a tensor is read and
written once instead of at every operation.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the rows of [rows, width] in fp32.

    Source: transformers, models/llama/modeling_llama.py, LlamaRMSNorm.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, beside: Tensor
) -> Tensor:
    """Return the gradient of x, to which the gradient of the residual path beside is added."""
    wide = x.float()
    rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = wide * rate
    inner = (gradient * weight).float()
    value = rate * (inner - scaled * (inner * scaled).mean(-1, keepdim=True))
    return (beside + value).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [rows, heads, width] by angles [rows, 1, width]; with -sin it turns back.

    Source: transformers, models/llama/modeling_llama.py, apply_rotary_pos_emb.
    """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return functional.silu(gate) * up


def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return silu(gate) * up once more, and the gradients of gate and up."""
    wide, other, given = gate.float(), up.float(), gradient.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    of_gate = given * other * sigmoid * (1 + wide * (1 - sigmoid))
    kind = gate.dtype
    return (silu * other).to(kind), of_gate.to(kind), (given * silu).to(kind)


def dropout_mask(x: Tensor, rate: float, seed: int) -> Tensor:
    """Return a tensor like x of zeros, at that rate, and 1 / (1 - rate) for the others.

    The same seed gives the same mask on devices of one type. On a CPU a drawn number gives four
    entries, and the rate is rounded to 16 bits: bernoulli_ draws one for each, which was a quarter
    of a training step.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cuda":
        return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    drawn.random_(-(2**63), None, generator=generator)
    numbers = drawn.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(2**16 - 1, round(rate * 2**16))
    return (numbers >= dropped - 2**15).to(x.dtype).div_(1 - rate)


@dataclass(frozen=True)
class Kernels:
    """The functions of this module, compiled or not."""

    rms_norm: Callable[..., Tensor] = rms_norm
    rms_norm_backward: Callable[..., Tensor] = rms_norm_backward
    rotate: Callable[..., Tensor] = rotate
    swiglu: Callable[..., Tensor] = swiglu
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = swiglu_backward


@functools.cache
def kernels_for(device_type: str) -> Kernels:
    """Return compiled functions for CUDA, the plain ones elsewhere or without a compiler."""
    if device_type != "cuda":
        return Kernels()
    try:
        # Triton needs a C compiler on the worker's image, which only the first call finds out.
        torch.compile(_probe)(torch.ones(8, device=device_type))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("train: layers run uncompiled and slower (%s)", reason)
        return Kernels()
    functions = (rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward)
    compiled: list[Any] = [torch.compile(function) for function in functions]
    return Kernels(*compiled)


def _probe(x: Tensor) -> Tensor:
    return x + 1
