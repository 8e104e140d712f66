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
