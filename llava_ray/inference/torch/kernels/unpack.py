"""Packed weights as a plain matrix, for prompts: there the tensor cores want 16-bit tiles."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

import torch
import triton
import triton.language as tl

from llava_ray.inference.torch.kernels.shared import INT8, ORDERS
from llava_ray.inference.torch.kernels.weights import Weight


@triton.jit
def store_pair(out_ptr, target, even, odd, mask):
    """Store two columns side by side, as one word of 32 bits."""
    dtype: tl.constexpr = tl.bfloat16 if out_ptr.dtype.element_ty == tl.bfloat16 else tl.float16
    low = even.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = odd.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + target, low | high, mask=mask)


@triton.jit
def unpack_kernel(
    w_ptr,
    scale_ptr,
    out_ptr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write TILE words of one row as (q - zero) * scale; grid (rows, tiles)."""
    WORDS: tl.constexpr = COLUMNS // 4 if FORMAT == INT8 else COLUMNS // 8
    PAIRS: tl.constexpr = 2 if FORMAT == INT8 else 4
    row = tl.program_id(0)
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = word < WORDS
    packed = tl.load(w_ptr + row * WORDS + word, mask=inside, other=0)
    target = row * (COLUMNS // 2) + (word // 8) * (8 * PAIRS) + word % 8
    if FORMAT == INT8:
        scale = tl.load(scale_ptr + row).to(tl.float32)
        zero = 128.0
    else:
        entry = scale_ptr + (row * (COLUMNS // GROUP) + (word * 8) // GROUP) * 2
        scale = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(entry + 1, mask=inside, other=0.0).to(tl.float32)
    STEP: tl.constexpr = 16 if FORMAT == INT8 else 4
    GAP: tl.constexpr = 8 if FORMAT == INT8 else 16
    MASK: tl.constexpr = 0xFF if FORMAT == INT8 else 0xF
    for pair in tl.static_range(PAIRS):
        even = ((packed >> (STEP * pair)) & MASK).to(tl.float32) - zero
        odd = ((packed >> (STEP * pair + GAP)) & MASK).to(tl.float32) - zero
        store_pair(out_ptr, target + 8 * pair, even * scale, odd * scale, inside)


def unpack_to(weight: Weight, buffer: torch.Tensor) -> torch.Tensor:
    """Write a packed weight's plain matrix to the start of a flat 16-bit buffer."""
    out = buffer[: weight.rows * weight.columns].view(weight.rows, weight.columns)
    words = weight.data.shape[1]
    tile = min(1024, triton.next_power_of_2(words))
    unpack_kernel[(weight.rows, -(-words // tile))](
        weight.data,
        weight.scale,
        out,
        COLUMNS=weight.columns,
        GROUP=weight.group,
        FORMAT=ORDERS[weight.format],
        TILE=tile,
        num_warps=4,
    )
    return out
