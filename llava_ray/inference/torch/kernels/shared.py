"""What several kernels do alike: column orders, the norm's factor, and what follows a product.

A norm is spread over two kernels. The one that writes the residual stream also writes it times
the next norm's gain, and its sum of squares; the one that reads it multiplies by 1 / rms after
its product. So a norm costs no launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
# (Triton's kernels are a language of their own, with untyped pointers.)

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

NATURAL = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
ORDERS = {"dense": 0, "int8": 1, "int4": 2}

PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
SWIGLU = tl.constexpr(2)
EPILOGUES = {"plain": 0, "residual": 1, "swiglu": 2}

MAX_PARTS = tl.constexpr(2048)
"""Partial sums of squares that one token can have."""


@triton.jit
def start_dependent(PDL: tl.constexpr):
    """Let the next kernel start, to load its weights; it waits before it reads activations."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Wait until the kernels before have written their results."""
    if PDL:
        gdc_wait()


@triton.jit
def place(column, COLUMNS: tl.constexpr, ORDER: tl.constexpr):
    """Return where small-batch kernels look for a column: in the order of packed bytes.

    int4: the low nibbles' columns first, then the high ones'.
    """
    if ORDER == INT8:
        pair = column // 2
        within = pair % 16
        result = 4 * ((pair // 16) * 8 + within % 8) + 2 * (within // 8) + column % 2
    elif ORDER == INT4:
        pair = column // 2
        within = pair % 32
        nibble = within // 8 + 4 * (column % 2)
        byte = 4 * ((pair // 32) * 8 + within % 8) + nibble // 2
        result = byte + (nibble % 2) * (COLUMNS // 2)
    else:
        result = column
    return result


@triton.jit
def inverse_rms(squares_ptr, parts, columns, eps, BB: tl.constexpr, PARTS: tl.constexpr):
    """Return 1 / rms of each token, float32 [BB], from its partial sums of squares."""
    token = tl.arange(0, BB)
    part = tl.arange(0, PARTS)
    squares = tl.load(
        squares_ptr + token[None, :] * MAX_PARTS + part[:, None],
        mask=(part < parts)[:, None],
        other=0.0,
    )
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)


@triton.jit
def finish(
    acc,
    block,
    out_ptr,
    gain_ptr,
    scaled_ptr,
    squares_ptr,
    batch,
    rows,
    parts,
    eps,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Finish a product's tile, float32 [BN, BB].

    All but RESIDUAL multiply it by the norm's factor first. PLAIN writes it. RESIDUAL adds it to
    `out`, in place, and writes the next norm's input. SWIGLU takes rows in pairs (gate, up) and
    writes silu(gate) * up.
    """
    BN: tl.constexpr = acc.shape[0]
    BB: tl.constexpr = acc.shape[1]
    token = tl.arange(0, BB)
    if EPILOGUE != RESIDUAL:
        factor = inverse_rms(squares_ptr, parts, COLUMNS, eps, BB, PARTS)
        acc = acc * factor[None, :]
    if EPILOGUE == SWIGLU:
        pairs = tl.permute(tl.reshape(acc, (BN // 2, 2, BB)), (0, 2, 1))
        gate, up = tl.split(pairs)
        row = block * (BN // 2) + tl.arange(0, BN // 2)
        target = out_ptr + token[None, :] * (rows // 2) + place(row, OUT_COLUMNS, ORDER)[:, None]
        mask = (row < rows // 2)[:, None] & (token < batch)[None, :]
        value = gate * tl.sigmoid(gate) * up
        tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row = block * BN + tl.arange(0, BN)
        target = out_ptr + token[None, :] * rows + row[:, None]
        mask = (row < rows)[:, None] & (token < batch)[None, :]
        if EPILOGUE == RESIDUAL:
            total = tl.load(target, mask=mask, other=0.0).to(tl.float32) + acc
            stored = total.to(out_ptr.dtype.element_ty)
            tl.store(target, stored, mask=mask)
            total = tl.where(mask, stored.to(tl.float32), 0.0)
            gain = tl.load(gain_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
            scaled = scaled_ptr + token[None, :] * rows + place(row, OUT_COLUMNS, ORDER)[:, None]
            value = total * gain[:, None]
            tl.store(scaled, value.to(scaled_ptr.dtype.element_ty), mask=mask)
            squares = tl.sum(total * total, axis=0)
            tl.store(squares_ptr + token * MAX_PARTS + block, squares, mask=token < batch)
        else:
            tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)
