"""The functions of pointwise.py for a GPU: each reads and writes a tensor once, in fp32 between.

torch.compile makes kernels as fast, but each call of what it makes costs the host 0.2 ms, and a
step of a 7B makes 384 calls.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
# (Triton's kernels are a language of their own, with untyped pointers.)

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

_BLOCK = 2048
"""Entries that one program of an elementwise kernel takes."""


@triton.jit
def _inverse_rms(x, eps, WIDTH: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    there = column < WIDTH
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + place, there, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, there, 0.0).to(tl.float32)
    scaled = (x * _inverse_rms(x, eps, WIDTH)).to(kind).to(tl.float32)
    tl.store(out_ptr + place, (weight * scaled).to(kind), there)


@triton.jit
def _rms_norm_backward(
    gradient_ptr, x_ptr, weight_ptr, beside_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    there = column < WIDTH
    x = tl.load(x_ptr + place, there, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, there, 0.0).to(tl.float32)
    inner = tl.load(gradient_ptr + place, there, 0.0).to(tl.float32) * weight
    beside = tl.load(beside_ptr + place, there, 0.0).to(tl.float32)
    rate = _inverse_rms(x, eps, WIDTH)
    scaled = x * rate
    value = beside + rate * (inner - scaled * (tl.sum(inner * scaled) / WIDTH))
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), there)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, row_stride, head_stride, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    there = (head < HEADS) & (column < HALF)
    angle, turn = row * 2 * HALF + column, column < HALF
    x_ptr += row * row_stride + head * head_stride + column
    out_ptr += row * HEADS * 2 * HALF + head * 2 * HALF + column
    low = tl.load(x_ptr, there, 0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF, there, 0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + angle, turn, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, turn, 0.0).to(tl.float32) * sign
    tl.store(out_ptr, (low * cos - high * sin).to(kind), there)
    cos = tl.load(cos_ptr + angle + HALF, turn, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle + HALF, turn, 0.0).to(tl.float32) * sign
    tl.store(out_ptr + HALF, (high * cos + low * sin).to(kind), there)


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    gate = tl.load(gate_ptr + place, there, 0.0).to(tl.float32)
    up = tl.load(up_ptr + place, there, 0.0).to(tl.float32)
    tl.store(out_ptr + place, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), there)


@triton.jit
def _swiglu_backward(
    gate_ptr, up_ptr, gradient_ptr, out_ptr, of_gate_ptr, of_up_ptr, count, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, there, 0.0).to(tl.float32)
    up = tl.load(up_ptr + place, there, 0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + place, there, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out_ptr + place, (silu * up).to(kind), there)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(of_gate_ptr + place, of_gate.to(kind), there)
    tl.store(of_up_ptr + place, (gradient * silu).to(kind), there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See pointwise.rms_norm."""
    out, width = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm[(len(x),)](x, weight, out, eps, WIDTH=width, BLOCK=block, num_warps=8)
    return out


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, beside: Tensor
) -> Tensor:
    """See pointwise.rms_norm_backward."""
    out, width = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(len(x),)](
        gradient, x, weight, beside, out, eps, WIDTH=width, BLOCK=block, num_warps=8
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """See pointwise.rotate; x's rows and heads may have any strides."""
    rows, heads, width = x.shape
    out = x.new_empty(x.shape)
    sizes = {"BH": triton.next_power_of_2(heads), "BW": triton.next_power_of_2(width // 2)}
    row_stride, head_stride, _ = x.stride()
    _rotate[(rows,)](
        x, cos, sin, out, row_stride, head_stride, sign, HEADS=heads, HALF=width // 2, **sizes
    )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See pointwise.swiglu."""
    out, count = torch.empty_like(gate), gate.numel()
    _swiglu[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK, num_warps=8)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See pointwise.swiglu_backward."""
    out, of_gate, of_up = (torch.empty_like(gate) for _ in range(3))
    count = gate.numel()
    _swiglu_backward[(triton.cdiv(count, _BLOCK),)](
        gate, up, gradient, out, of_gate, of_up, count, BLOCK=_BLOCK, num_warps=8
    )
    return out, of_gate, of_up
