"""One token times a weight matrix: each program holds whole rows, so nothing is summed twice.

Packed weights are turned into float16 pairs by bit tricks (1024 + q is q in the low bits of
0x6400, Kim et al., arXiv:2211.10017) and multiplied two at a time; at most four products are
summed in float16 before float32 takes over.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

import triton
import triton.language as tl

from llava_ray.inference.torch.kernels.shared import (
    INT4,
    INT8,
    NATURAL,
    await_previous,
    finish,
    start_dependent,
)

# (q - 8) of the words' eight nibbles times four pairs of activations, summed.
INT4_DOT = tl.constexpr("""
{
.reg .b32 m, n, c, t, a, s, e, d;
.reg .b16 l, h;
.reg .f32 f, g;
mov.b32 c, 0x64006400;
mov.b32 m, 0x64086408;
mov.b32 e, 0x2c002c00;
mov.b32 d, 0xd480d480;
lop3.b32 t, $1, 0x000f000f, c, 0xea;
sub.f16x2 t, t, m;
mul.f16x2 a, t, $2;
lop3.b32 t, $1, 0x00f000f0, c, 0xea;
fma.rn.f16x2 t, t, e, d;
fma.rn.f16x2 a, t, $3, a;
shr.u32 s, $1, 8;
lop3.b32 t, s, 0x000f000f, c, 0xea;
sub.f16x2 t, t, m;
fma.rn.f16x2 a, t, $4, a;
lop3.b32 t, s, 0x00f000f0, c, 0xea;
fma.rn.f16x2 t, t, e, d;
fma.rn.f16x2 a, t, $5, a;
mov.b32 {l, h}, a;
cvt.f32.f16 f, l;
cvt.f32.f16 g, h;
add.f32 $0, f, g;
}
""")

# (q - 128) of the words' four bytes times two pairs of activations, summed.
INT8_DOT = tl.constexpr("""
{
.reg .b32 c, m, t, a;
.reg .b16 l, h;
.reg .f32 f, g;
mov.b32 c, 0x64646464;
mov.b32 m, 0x64806480;
prmt.b32 t, $1, c, 0x4140;
sub.f16x2 t, t, m;
mul.f16x2 a, t, $2;
prmt.b32 t, $1, c, 0x4342;
sub.f16x2 t, t, m;
fma.rn.f16x2 a, t, $3, a;
mov.b32 {l, h}, a;
cvt.f32.f16 f, l;
cvt.f32.f16 g, h;
add.f32 $0, f, g;
}
""")


@triton.jit
def low_half(word):
    """Return the float16 in a word's low half, as float32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    """Return the float16 in a word's high half, as float32."""
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pair_dot(word, x, FIRST: tl.constexpr, GAP: tl.constexpr, BITS: tl.constexpr):
    """Return two products of a word's fields that begin at the bits FIRST and FIRST + GAP."""
    MASK: tl.constexpr = (1 << BITS) - 1
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    even = ((word >> FIRST) & MASK) - MIDDLE
    odd = ((word >> (FIRST + GAP)) & MASK) - MIDDLE
    return even.to(tl.float32) * low_half(x) + odd.to(tl.float32) * high_half(x)


@triton.jit
def int4_dot(word, x0, x1, x2, x3, ASM: tl.constexpr):
    """Return the sum of (q - 8) * x over each word."""
    if ASM:
        result = tl.inline_asm_elementwise(
            INT4_DOT, "=f,r,r,r,r,r", [word, x0, x1, x2, x3], tl.float32, is_pure=True, pack=1
        )
    else:
        result = pair_dot(word, x0, 0, 16, 4) + pair_dot(word, x1, 4, 16, 4)
        result += pair_dot(word, x2, 8, 16, 4) + pair_dot(word, x3, 12, 16, 4)
    return result


@triton.jit
def int8_dot(word, x0, x1, ASM: tl.constexpr):
    """Return the sum of (q - 128) * x over each word."""
    if ASM:
        result = tl.inline_asm_elementwise(
            INT8_DOT, "=f,r,r,r", [word, x0, x1], tl.float32, is_pure=True, pack=1
        )
    else:
        result = pair_dot(word, x0, 0, 8, 8) + pair_dot(word, x1, 16, 8, 8)
    return result


@triton.jit
def both_halves(x):
    """Return the sum of a word's two float16 values."""
    return low_half(x) + high_half(x)


@triton.jit
def load_words(w_ptr, row, first, WORDS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Load int32 [rows, TILE] of each row from a word on; anything beyond the row."""
    word = first + tl.arange(0, TILE)[None, :]
    pointer = w_ptr + row[:, None] * WORDS + word
    if WHOLE:
        words = tl.load(pointer, eviction_policy="evict_first")
    else:
        words = tl.load(pointer, mask=word < WORDS, other=0, eviction_policy="evict_first")
    return words


@triton.jit
def load_pairs(
    x_ptr,
    first,
    J: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load int32 [1, TILE]: pair J of each word; 0 beyond the row."""
    word = tl.arange(0, TILE)[None, :]
    pointer = x_ptr + first * PAIRS + (word // 8) * (8 * PAIRS) + J * 8 + word % 8
    return tl.load(pointer) if WHOLE else tl.load(pointer, mask=first + word < WORDS, other=0)


@triton.jit
def load_scales(
    scale_ptr,
    row,
    first,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load int32 [rows, TILE / 8]: scale and zero of each superblock of 64 columns."""
    block = first // 8 + tl.arange(0, TILE // 8)[None, :]
    pointer = scale_ptr + row[:, None] * (COLUMNS // GROUP) + (block * 64) // GROUP
    return tl.load(pointer) if WHOLE else tl.load(pointer, mask=block * 64 < COLUMNS, other=0)


@triton.jit
def for_each_word(scales, BN: tl.constexpr, TILE: tl.constexpr):
    """Repeat each superblock's entry for its 8 words: [BN, TILE / 8] to [BN, TILE]."""
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, TILE // 8, 8)), (BN, TILE))


@triton.jit
def dense_rows(
    x_ptr,
    w_ptr,
    row,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Return x @ w[rows].T, float32 [BN]; TILE columns at a time."""
    STEPS: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    column = tl.arange(0, TILE)[None, :]
    pointer = w_ptr + row[:, None] * COLUMNS + column
    w = tl.load(pointer, mask=column < COLUMNS, other=0.0, eviction_policy="evict_first")
    await_previous(PDL)
    acc = tl.zeros((BN, TILE), tl.float32)
    # Not unrolled: the compiler would load all of a long row first and run out of registers.
    for step in tl.range(0, STEPS):
        here, ahead = step * TILE + column, (step + 1) * TILE + column
        x = tl.load(x_ptr + here, mask=here < COLUMNS, other=0.0)
        current = w
        w = tl.load(
            pointer + (step + 1) * TILE,
            mask=ahead < COLUMNS,
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += current.to(tl.float32) * x.to(tl.float32)
    return tl.sum(acc, axis=1)


@triton.jit
def packed_rows(
    x_ptr,
    w_ptr,
    scale_ptr,
    row,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BN: tl.constexpr,
    TILE: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Return x @ w[rows].T, float32 [BN]; TILE words at a time."""
    PAIRS: tl.constexpr = 2 if FORMAT == INT8 else 4
    WORDS: tl.constexpr = COLUMNS // (2 * PAIRS)
    STEPS: tl.constexpr = (WORDS + TILE - 1) // TILE
    w = load_words(w_ptr, row, 0, WORDS, TILE, TILE <= WORDS)
    if FORMAT == INT8:
        scales = tl.load(scale_ptr + row).to(tl.float32)
    else:
        scales = load_scales(scale_ptr, row, 0, COLUMNS, GROUP, TILE, TILE <= WORDS)
    await_previous(PDL)
    acc = tl.zeros((BN, TILE), tl.float32)
    for step in tl.static_range(STEPS):
        x0 = load_pairs(x_ptr, step * TILE, 0, PAIRS, WORDS, TILE, (step + 1) * TILE <= WORDS)
        x1 = load_pairs(x_ptr, step * TILE, 1, PAIRS, WORDS, TILE, (step + 1) * TILE <= WORDS)
        current = w
        if FORMAT == INT4:
            x2 = load_pairs(x_ptr, step * TILE, 2, PAIRS, WORDS, TILE, (step + 1) * TILE <= WORDS)
            x3 = load_pairs(x_ptr, step * TILE, 3, PAIRS, WORDS, TILE, (step + 1) * TILE <= WORDS)
            current_scales = for_each_word(scales, BN, TILE)
        if step + 1 < STEPS:
            w = load_words(w_ptr, row, (step + 1) * TILE, WORDS, TILE, (step + 2) * TILE <= WORDS)
            if FORMAT == INT4:
                scales = load_scales(
                    scale_ptr,
                    row,
                    (step + 1) * TILE,
                    COLUMNS,
                    GROUP,
                    TILE,
                    (step + 2) * TILE <= WORDS,
                )
        if FORMAT == INT8:
            acc += int8_dot(current, x0, x1, ASM)
        else:
            x_sum = both_halves(x0) + both_halves(x1) + both_halves(x2) + both_halves(x3)
            shifted = int4_dot(current, x0, x1, x2, x3, ASM)
            acc += low_half(current_scales) * (shifted - (high_half(current_scales) - 8) * x_sum)
    result = tl.sum(acc, axis=1)
    if FORMAT == INT8:
        result = result * scales
    return result


@triton.jit
def gemv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    gain_ptr,
    scaled_ptr,
    squares_ptr,
    rows,
    parts,
    eps,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BN: tl.constexpr,
    TILE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PARTS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply one token by BN rows; see `finish` for what follows."""
    start_dependent(PDL)
    block = tl.program_id(0)
    row = tl.minimum(block * BN + tl.arange(0, BN), rows - 1)
    if FORMAT == NATURAL:
        acc = dense_rows(x_ptr, w_ptr, row, COLUMNS, BN, TILE, PDL)
    else:
        acc = packed_rows(x_ptr, w_ptr, scale_ptr, row, COLUMNS, GROUP, FORMAT, BN, TILE, ASM, PDL)
    finish(
        acc[:, None],
        block,
        out_ptr,
        gain_ptr,
        scaled_ptr,
        squares_ptr,
        1,
        rows,
        parts,
        eps,
        COLUMNS,
        EPILOGUE,
        1,
        0,
        PARTS,
    )
