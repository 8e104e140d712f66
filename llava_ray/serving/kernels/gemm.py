"""Two to eight tokens times a weight matrix, on the tensor cores.

Columns are split over programs; the last one to finish a tile sums the parts, in their order, so
that the result does not depend on timing. Activations come in the order of packed bytes
(`shared.place`), so that no value is moved in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

import triton
import triton.language as tl

from llava_ray.serving.kernels.shared import (
    INT4,
    INT8,
    await_previous,
    finish,
    start_dependent,
)


@triton.jit
def load_tokens(x_ptr, column, batch, COLUMNS: tl.constexpr, BB: tl.constexpr, END: tl.constexpr):
    """Load [len(column), BB] of the activations, 0 beyond the batch or the columns."""
    token = tl.arange(0, BB)
    pointer = x_ptr + token[None, :] * COLUMNS + column[:, None]
    return tl.load(pointer, mask=(token < batch)[None, :] & (column < END)[:, None], other=0.0)


@triton.jit
def dense_tile(
    x_ptr,
    w_ptr,
    row,
    part,
    batch,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return this part's w[rows] @ x.T, float32 [BN, BB]."""
    SPAN: tl.constexpr = (COLUMNS + SPLIT * BK - 1) // (SPLIT * BK) * BK
    WHOLE: tl.constexpr = SPAN * SPLIT == COLUMNS
    acc = tl.zeros((BN, BB), tl.float32)
    for step in tl.range(0, SPAN // BK, num_stages=STAGES):
        column = part * SPAN + step * BK + tl.arange(0, BK)
        pointer = w_ptr + row[:, None] * COLUMNS + column[None, :]
        if WHOLE:
            w = tl.load(pointer, eviction_policy="evict_first")
        else:
            w = tl.load(
                pointer, mask=(column < COLUMNS)[None, :], other=0.0, eviction_policy="evict_first"
            )
        x = load_tokens(x_ptr, column, batch, COLUMNS, BB, COLUMNS)
        acc = tl.dot(w, x.to(w.dtype), acc)
    return acc


@triton.jit
def int8_tile(
    x_ptr,
    w_ptr,
    scale_ptr,
    row,
    part,
    batch,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return this part's w[rows] @ x.T, float32 [BN, BB]; `w_ptr` points to bytes."""
    SPAN: tl.constexpr = (COLUMNS + SPLIT * BK - 1) // (SPLIT * BK) * BK
    WHOLE: tl.constexpr = SPAN * SPLIT == COLUMNS
    acc = tl.zeros((BN, BB), tl.float32)
    for step in tl.range(0, SPAN // BK, num_stages=STAGES):
        column = part * SPAN + step * BK + tl.arange(0, BK)
        pointer = w_ptr + row[:, None] * COLUMNS + column[None, :]
        if WHOLE:
            w = tl.load(pointer, eviction_policy="evict_first")
        else:
            w = tl.load(
                pointer, mask=(column < COLUMNS)[None, :], other=0, eviction_policy="evict_first"
            )
        x = load_tokens(x_ptr, column, batch, COLUMNS, BB, COLUMNS)
        acc = tl.dot(w.to(tl.float16) - 128.0, x, acc)
    return acc * tl.load(scale_ptr + row).to(tl.float32)[:, None]


@triton.jit
def int4_tile(
    x_ptr,
    w_ptr,
    scale_ptr,
    row,
    part,
    batch,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return this part's w[rows] @ x.T, float32 [BN, BB], a group at a time."""
    BYTES: tl.constexpr = COLUMNS // 2
    BK: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = COLUMNS // GROUP
    SPAN: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    acc = tl.zeros((BN, BB), tl.float32)
    WHOLE: tl.constexpr = SPAN * SPLIT == GROUPS
    for step in tl.range(0, SPAN, num_stages=STAGES):
        group = part * SPAN + step
        byte = group * BK + tl.arange(0, BK)
        pointer = w_ptr + row[:, None] * BYTES + byte[None, :]
        entry = scale_ptr + (row * GROUPS + group) * 2
        if WHOLE:
            w = tl.load(pointer, eviction_policy="evict_first")
            scale = tl.load(entry).to(tl.float32)
            zero = tl.load(entry + 1)[:, None]
        else:
            inside = (row >= 0) & (group < GROUPS)
            w = tl.load(pointer, mask=inside[:, None], other=0, eviction_policy="evict_first")
            scale = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(entry + 1, mask=inside, other=0.0)[:, None]
        low = load_tokens(x_ptr, byte, batch, COLUMNS, BB, BYTES)
        high = load_tokens(x_ptr + BYTES, byte, batch, COLUMNS, BB, BYTES)
        part_sum = tl.dot((w & 0xF).to(tl.float16) - zero, low)
        part_sum = tl.dot((w >> 4).to(tl.float16) - zero, high, part_sum)
        acc += part_sum * scale[:, None]
    return acc


@triton.jit
def gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    gain_ptr,
    scaled_ptr,
    squares_in_ptr,
    squares_out_ptr,
    parts_ptr,
    counter_ptr,
    batch,
    rows,
    parts,
    stride,
    eps,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    NORM: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply up to BB tokens by BN rows; see `finish` for what follows."""
    start_dependent(PDL)
    await_previous(PDL)
    block, part = tl.program_id(0), tl.program_id(1)
    row = tl.minimum(block * BN + tl.arange(0, BN), rows - 1)
    if FORMAT == INT4:
        acc = int4_tile(
            x_ptr, w_ptr, scale_ptr, row, part, batch, COLUMNS, GROUP, BN, BB, SPLIT, STAGES
        )
    elif FORMAT == INT8:
        acc = int8_tile(
            x_ptr, w_ptr, scale_ptr, row, part, batch, COLUMNS, BN, BB, BK, SPLIT, STAGES
        )
    else:
        acc = dense_tile(x_ptr, w_ptr, row, part, batch, COLUMNS, BN, BB, BK, SPLIT, STAGES)
    last = SPLIT == 1
    if SPLIT > 1:
        cell = tl.arange(0, BN)[:, None] * BB + tl.arange(0, BB)[None, :]
        tile_ptr = parts_ptr + block * (SPLIT * BN * BB) + cell
        tl.store(tile_ptr + part * (BN * BB), acc)
        # All threads' stores must be there before the counter says so.
        tl.debug_barrier()
        last = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            acc = tl.zeros((BN, BB), tl.float32)
            for index in tl.static_range(SPLIT):
                acc += tl.load(tile_ptr + index * (BN * BB), cache_modifier=".cg")
            tl.store(counter_ptr + block, 0)
    if last:
        finish(
            acc,
            block,
            out_ptr,
            gain_ptr,
            scaled_ptr,
            squares_in_ptr,
            squares_out_ptr,
            batch,
            rows,
            parts,
            stride,
            eps,
            COLUMNS,
            BN,
            BB,
            EPILOGUE,
            NORM,
            OUT_COLUMNS,
            ORDER,
            PARTS,
        )
