"""Two to 64 tokens times a weight matrix, on the tensor cores.

Columns are split over programs; the last one to finish a tile sums the parts, in their order, so
that the result does not depend on timing. Activations come in the order of packed bytes
(`shared.place`), so that no value is moved in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

import triton
import triton.language as tl

from llava_ray.inference.torch.kernels.shared import (
    INT4,
    INT8,
    await_previous,
    finish,
    start_dependent,
)

# Four bytes' low and high nibbles less 8, as float16 pairs: 1024 + q is q in the low bits of
# 0x6400, and 1024 + 16 * q is q one nibble higher.
INT4_VALUES = tl.constexpr("""
{
.reg .b32 c, m, e, d, s, t, u;
mov.b32 c, 0x64646464;
mov.b32 m, 0x64086408;
mov.b32 e, 0x2c002c00;
mov.b32 d, 0xd480d480;
prmt.b32 s, $4, c, 0x4140;
prmt.b32 u, $4, c, 0x4342;
and.b32 t, s, 0xff0fff0f;
sub.f16x2 $0, t, m;
and.b32 t, u, 0xff0fff0f;
sub.f16x2 $1, t, m;
and.b32 t, s, 0xfff0fff0;
fma.rn.f16x2 $2, t, e, d;
and.b32 t, u, 0xfff0fff0;
fma.rn.f16x2 $3, t, e, d;
}
""")

# Four ones, in the layout of the bytes: their product with activations is the activations' sum.
ONES = tl.constexpr("mov.b32 $0, 0x3c003c00; mov.b32 $1, 0x3c003c00;")

# Four bytes less 128 as float16 pairs.
INT8_VALUES = tl.constexpr("""
{
.reg .b32 c, m, t;
mov.b32 c, 0x64646464;
mov.b32 m, 0x64806480;
prmt.b32 t, $2, c, 0x4140;
sub.f16x2 $0, t, m;
prmt.b32 t, $2, c, 0x4342;
sub.f16x2 $1, t, m;
}
""")


@triton.jit
def int4_values(w, ASM: tl.constexpr):
    """Return the low and the high nibbles of bytes, less 8, and ones, as float16."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            INT4_VALUES,
            "=&r,=&r,=&r,=&r,r",
            [w],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        ones = tl.inline_asm_elementwise(ONES, "=r,=r,r", [w], tl.float16, is_pure=True, pack=4)
    else:
        ones = tl.full(w.shape, 1.0, tl.float16)
        low = (w & 0xF).to(tl.float16) - 8.0
        high = (w >> 4).to(tl.float16) - 8.0
    return low, high, ones


@triton.jit
def int8_values(w, ASM: tl.constexpr):
    """Return bytes less 128, float16."""
    if ASM:
        values = tl.inline_asm_elementwise(
            INT8_VALUES, "=&r,=&r,r", [w], tl.float16, is_pure=True, pack=4
        )
    else:
        values = w.to(tl.float16) - 128.0
    return values


@triton.jit
def load_tokens(x_ptr, column, batch, COLUMNS: tl.constexpr, BB: tl.constexpr, END: tl.constexpr):
    """Load [len(column), BB] of the activations, 0 beyond the batch or the columns."""
    token = tl.arange(0, BB)
    pointer = x_ptr + token[None, :] * COLUMNS + column[:, None]
    return tl.load(pointer, mask=(token < batch)[None, :] & (column < END)[:, None], other=0.0)


@triton.jit
def load_weights(pointer, inside, WHOLE: tl.constexpr):
    """Load weights that are read once; 0 where they are not inside, unless all are."""
    if WHOLE:
        w = tl.load(pointer, eviction_policy="evict_first")
    else:
        w = tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")
    return w


@triton.jit
def row_tile(
    x_ptr,
    w_ptr,
    scale_ptr,
    row,
    part,
    batch,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return this part's w[rows] @ x.T, float32 [BN, BB], of plain weights or of int8's bytes."""
    SPAN: tl.constexpr = (COLUMNS + SPLIT * BK - 1) // (SPLIT * BK) * BK
    acc = tl.zeros((BN, BB), tl.float32)
    for step in tl.range(0, SPAN // BK, num_stages=STAGES):
        column = part * SPAN + step * BK + tl.arange(0, BK)
        pointer = w_ptr + row[:, None] * COLUMNS + column[None, :]
        w = load_weights(pointer, (column < COLUMNS)[None, :], SPAN * SPLIT == COLUMNS)
        x = load_tokens(x_ptr, column, batch, COLUMNS, BB, COLUMNS)
        if FORMAT == INT8:
            acc = tl.dot(int8_values(w, ASM), x, acc)
        else:
            acc = tl.dot(w, x.to(w.dtype), acc)
    if FORMAT == INT8:
        acc = acc * tl.load(scale_ptr + row).to(tl.float32)[:, None]
    return acc


@triton.jit
def load_entry(entry_ptr, group, GROUPS: tl.constexpr):
    """Load each row's scale and zero point of a group, float16; 0 beyond the last."""
    inside = group < GROUPS
    scale = tl.load(entry_ptr, mask=inside, other=0.0)
    return scale, tl.load(entry_ptr + 1, mask=inside, other=0.0)


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
    ASM: tl.constexpr,
):
    """Return this part's w[rows] @ x.T, float32 [BN, BB], a group at a time."""
    BYTES: tl.constexpr = COLUMNS // 2
    BK: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = COLUMNS // GROUP
    SPAN: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    acc = tl.zeros((BN, BB), tl.float32)
    entry = scale_ptr + (row * GROUPS + part * SPAN) * 2
    scale, zero = load_entry(entry, part * SPAN, GROUPS)
    for step in tl.range(0, SPAN, num_stages=STAGES):
        group = part * SPAN + step
        # One group ahead, since the compiler pipelines only what `dot` reads.
        next_scale, next_zero = load_entry(entry + 2 * (step + 1), group + 1, GROUPS)
        byte = group * BK + tl.arange(0, BK)
        pointer = w_ptr + row[:, None] * BYTES + byte[None, :]
        inside = (row >= 0) & (group < GROUPS)
        w = load_weights(pointer, inside[:, None], SPAN * SPLIT == GROUPS)
        low = load_tokens(x_ptr, byte, batch, COLUMNS, BB, BYTES)
        high = load_tokens(x_ptr + BYTES, byte, batch, COLUMNS, BB, BYTES)
        low_values, high_values, ones = int4_values(w, ASM)
        products = tl.dot(high_values, high, tl.dot(low_values, low))
        # The tensor cores sum the activations too, for the zero points' share.
        sums = tl.dot(ones, high, tl.dot(ones, low))
        shift = (zero.to(tl.float32) - 8.0)[:, None]
        acc += (products - shift * sums) * scale.to(tl.float32)[:, None]
        scale, zero = next_scale, next_zero
    return acc


@triton.jit
def gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    gain_ptr,
    scaled_ptr,
    squares_ptr,
    parts_ptr,
    counter_ptr,
    batch,
    rows,
    parts,
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
    OUT_COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    PARTS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply up to BB tokens by BN rows; see `finish` for what follows."""
    start_dependent(PDL)
    await_previous(PDL)
    block, part = tl.program_id(0), tl.program_id(1)
    row = tl.minimum(block * BN + tl.arange(0, BN), rows - 1)
    if FORMAT == INT4:
        acc = int4_tile(
            x_ptr, w_ptr, scale_ptr, row, part, batch, COLUMNS, GROUP, BN, BB, SPLIT, STAGES, ASM
        )
    else:
        acc = row_tile(
            x_ptr, w_ptr, scale_ptr, row, part, batch, COLUMNS, FORMAT, BN, BB, BK, SPLIT, STAGES,
            ASM,
        )  # fmt: skip
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
            squares_ptr,
            batch,
            rows,
            parts,
            eps,
            COLUMNS,
            EPILOGUE,
            OUT_COLUMNS,
            ORDER,
            PARTS,
        )
