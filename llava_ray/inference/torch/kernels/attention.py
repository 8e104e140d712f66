"""One new token per sequence: embedding, and attention over the slots' static cache."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

import triton
import triton.language as tl

from llava_ray.inference.torch.kernels.shared import (
    MAX_PARTS,
    await_previous,
    place,
    start_dependent,
)


@triton.jit
def embed_kernel(
    token_ptr,
    table_ptr,
    gain_ptr,
    hidden_ptr,
    scaled_ptr,
    squares_ptr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write each token's embedding, the first norm's input and its sum of squares."""
    start_dependent(PDL)
    await_previous(PDL)
    index = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    token = tl.load(token_ptr + index)
    value = tl.load(table_ptr + token * COLUMNS + column, mask=inside, other=0.0)
    tl.store(hidden_ptr + index * COLUMNS + column, value, mask=inside)
    value = value.to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    target = scaled_ptr + index * COLUMNS + place(column, COLUMNS, ORDER)
    tl.store(target, (value * gain).to(scaled_ptr.dtype.element_ty), mask=inside)
    tl.store(squares_ptr + index * MAX_PARTS, tl.sum(value * value, axis=0))


@triton.jit
def rotated(base_ptr, cos_ptr, sin_ptr, position, DIM: tl.constexpr):
    """Return the two halves of a head's vector, rotated, float32 [DIM / 2] each."""
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, HALF)
    low = tl.load(base_ptr + half).to(tl.float32)
    high = tl.load(base_ptr + HALF + half).to(tl.float32)
    cos_low = tl.load(cos_ptr + position * DIM + half).to(tl.float32)
    cos_high = tl.load(cos_ptr + position * DIM + HALF + half).to(tl.float32)
    # The table's first half is negated already.
    sin_low = tl.load(sin_ptr + position * DIM + half).to(tl.float32)
    sin_high = tl.load(sin_ptr + position * DIM + HALF + half).to(tl.float32)
    return low * cos_low + high * sin_low, high * cos_high + low * sin_high


@triton.jit
def attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    slot_ptr,
    length_ptr,
    out_ptr,
    parts_ptr,
    counter_ptr,
    context,
    scaling,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    ORDER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate, append to the cache and attend; grid (tokens, heads, SPLIT).

    The cache's rows are split over programs; the last one to finish a head joins the parts
    (Flash-Decoding). `keys_ptr` points to this layer's [slots, kv_heads, context, DIM].
    """
    start_dependent(PDL)
    await_previous(PDL)
    index, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    HALF: tl.constexpr = DIM // 2
    half, dim = tl.arange(0, HALF), tl.arange(0, DIM)
    slot = tl.load(slot_ptr + index).to(tl.int64)
    position = tl.load(length_ptr + slot).to(tl.int32)
    row_ptr = qkv_ptr + index * ((HEADS + 2 * KV_HEADS) * DIM)
    q_low, q_high = rotated(row_ptr + head * DIM, cos_ptr, sin_ptr, position, DIM)
    base = (slot * KV_HEADS + kv_head) * context * DIM
    span = (position + SPLIT * BLOCK) // (SPLIT * BLOCK) * BLOCK
    start = part * span
    end = tl.minimum(start + span, position)
    best = -float("inf")
    total = 0.0
    acc = tl.zeros((DIM,), tl.float32)
    first = start
    while first < end:
        token = first + tl.arange(0, BLOCK)
        inside = (token < end)[:, None]
        cell = base + token[:, None] * DIM
        key_low = tl.load(keys_ptr + cell + half[None, :], mask=inside, other=0.0)
        key_high = tl.load(keys_ptr + cell + HALF + half[None, :], mask=inside, other=0.0)
        value = tl.load(values_ptr + cell + dim[None, :], mask=inside, other=0.0)
        scores = tl.sum(
            key_low.to(tl.float32) * q_low[None, :] + key_high.to(tl.float32) * q_high[None, :],
            axis=1,
        )
        scores = tl.where(token < end, scores * scaling, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=0))
        weight = tl.exp(scores - new_best)
        old = tl.exp(best - new_best)
        total = total * old + tl.sum(weight, axis=0)
        acc = acc * old + tl.sum(weight[:, None] * value.to(tl.float32), axis=0)
        best = new_best
        first += BLOCK
    if (start <= position) & (position < start + span):
        # The new token's own key and value come from registers: the cache's row is just written.
        key_base = row_ptr + (HEADS + kv_head) * DIM
        key_low, key_high = rotated(key_base, cos_ptr, sin_ptr, position, DIM)
        value = tl.load(row_ptr + (HEADS + KV_HEADS + kv_head) * DIM + dim)
        kept_low = key_low.to(keys_ptr.dtype.element_ty)
        kept_high = key_high.to(keys_ptr.dtype.element_ty)
        if head % (HEADS // KV_HEADS) == 0:
            cell = base + position * DIM
            tl.store(keys_ptr + cell + half, kept_low)
            tl.store(keys_ptr + cell + HALF + half, kept_high)
            tl.store(values_ptr + cell + dim, value.to(values_ptr.dtype.element_ty))
        products = kept_low.to(tl.float32) * q_low + kept_high.to(tl.float32) * q_high
        score = tl.sum(products, axis=0) * scaling
        new_best = tl.maximum(best, score)
        weight = tl.exp(score - new_best)
        old = tl.exp(best - new_best)
        total = total * old + weight
        acc = acc * old + weight * value.to(tl.float32)
        best = new_best
    # A part is DIM sums, then the maximum and the total.
    cell = ((index * HEADS + head) * SPLIT) * (DIM + 2)
    tl.store(parts_ptr + cell + part * (DIM + 2) + dim, acc)
    tl.store(parts_ptr + cell + part * (DIM + 2) + DIM, best)
    tl.store(parts_ptr + cell + part * (DIM + 2) + DIM + 1, total)
    tl.debug_barrier()
    counter = counter_ptr + index * HEADS + head
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
        parts = cell + tl.arange(0, SPLIT) * (DIM + 2)
        bests = tl.load(parts_ptr + parts + DIM, cache_modifier=".cg")
        totals = tl.load(parts_ptr + parts + DIM + 1, cache_modifier=".cg")
        sums = tl.load(parts_ptr + parts[:, None] + dim[None, :], cache_modifier=".cg")
        weights = tl.exp(bests - tl.max(bests, axis=0))
        joined = tl.sum(sums * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
        target = out_ptr + index * (HEADS * DIM) + place(head * DIM + dim, HEADS * DIM, ORDER)
        tl.store(target, joined.to(out_ptr.dtype.element_ty))
        tl.store(counter, 0)
