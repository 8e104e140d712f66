"""The Triton kernels of the decode step against plain references.

They run on a GPU, or through Triton's interpreter on a CPU.
"""

import copy
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llava_ray.inference.torch.cache import Segment, SlotCache  # noqa: E402
from llava_ray.inference.torch.decode import Decoder, read_stack  # noqa: E402
from llava_ray.inference.torch.kernels.launch import (
    MAX_BATCH,
    Attention,
    Block,
    Product,
    Scratch,
    Squares,
)
from llava_ray.inference.torch.kernels.unpack import unpack_to  # noqa: E402
from llava_ray.inference.torch.kernels.weights import (
    Format,
    PackedLinear,
    Unpacked,
    Weight,
    pack,
    placed,
    unpack,
)
from llava_ray.inference.torch.llama import LlamaForward, module_layers  # noqa: E402

# The interpreter computes in NumPy, which warns where sigmoid's exp becomes infinite, as it may.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# float16 inputs and outputs: half a unit in the last place is 5e-4.
TOLERANCE = 2e-3


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def make_weight(format_: Format, rows: int, columns: int, group: int) -> Weight:
    generator = torch.Generator().manual_seed(rows + columns)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    if format_ == "dense":
        data = torch.randn(rows, columns, generator=generator).half()
        return Weight("dense", rows, columns, data.to(DEVICE))
    if format_ == "int8":
        codes = (rand(rows, columns) * 256).to(torch.uint8)
        scales, zeros, bits = rand(rows, 1) * 0.01 + 0.001, torch.full((rows, 1), 128.0), 8
    else:
        codes = (rand(rows, columns) * 16).to(torch.uint8)
        scales = rand(rows, columns // group) * 0.1 + 0.01
        zeros, bits = rand(rows, columns // group) * 15, 4
    values = Unpacked(codes.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE), bits)
    return pack(values)


def test_packing_keeps_every_code() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 8)
    scales, zeros = torch.tensor([[1.0, 2.0], [0.5, 4.0]]), torch.tensor([[0.0, 3.0], [8.0, 15.0]])
    plain = ((codes.view(2, 2, 64).float() - zeros[..., None]) * scales[..., None]).view(2, 128)
    assert torch.equal(unpack(pack(Unpacked(codes, scales, zeros, 4)), torch.float32), plain)
    wide = torch.arange(64, dtype=torch.uint8).repeat(2, 1) * 4
    values = Unpacked(wide, scales[:, :1], torch.full((2, 1), 128.0), 8)
    plain = (wide.float() - 128) * scales[:, :1]
    assert torch.equal(unpack(pack(values), torch.float32), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_unpack_kernel(format_: Format, dtype: torch.dtype) -> None:
    weight = make_weight(format_, 6, 192, 64)
    buffer = torch.full((6 * 192 + 5,), float("nan"), dtype=dtype, device=DEVICE)
    wanted = unpack(weight, torch.float32).to(dtype)
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(unpack_to(weight, buffer), wanted) < tolerance


# Rows that no block divides, rows of several tiles and a part of one.
SHAPES = [(40, 256, 64), (24, 768, 128), (64, 1344, 64)]


@pytest.mark.parametrize("epilogue", ["plain", "residual", "swiglu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 20, 64])
@pytest.mark.parametrize("format_", ["dense", "int8", "int4"])
def test_products(format_: Format, batch: int, shape: tuple[int, int, int], epilogue: Any) -> None:
    rows, columns, group = shape
    weight = make_weight(format_, rows, columns, group)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, columns, generator=generator).half().to(DEVICE)
    squares = Squares.empty(DEVICE).of(3)
    squares.buffer[:, :3] = torch.rand(MAX_BATCH, 3, generator=generator).to(DEVICE) * columns
    gain = torch.rand(rows, generator=generator).half().to(DEVICE)
    reference = x.float() @ unpack(weight, torch.float32).T
    out = torch.full((batch, rows), float("nan"), device=DEVICE)
    if epilogue == "residual":
        out = torch.randn(batch, rows, generator=generator).to(DEVICE)
        reference = reference + out
    else:
        mean = squares.buffer[:batch, :3].sum(1, keepdim=True) / columns
        reference = reference / torch.sqrt(mean + EPS)
    if epilogue == "swiglu":
        out = out[:, : rows // 2].contiguous()
        reference = torch.nn.functional.silu(reference[:, 0::2]) * reference[:, 1::2]
    reader: Format = "int4" if rows % 64 == 0 and batch > 1 and epilogue == "residual" else "dense"
    scaled = torch.full((batch, rows), float("nan"), device=DEVICE)
    product = Product(weight, epilogue, EPS, gain, reader)
    scratch = Scratch.empty(2 * (rows + 64) * max(8, batch), DEVICE)
    block = Block(8, 256, 2) if batch == 1 else Block(16, 64, 1, split=2, stages=2)
    x = x if batch == 1 else placed(x, format_).contiguous()
    summed = product.launch(batch, x, out, squares, scratch, scaled, block)
    assert relative_error(out, reference) < TOLERANCE
    if epilogue == "residual":
        wanted = placed(out * gain, reader)
        assert relative_error(scaled, wanted) < TOLERANCE
        total = summed.buffer[:batch, : summed.parts].sum(1)
        assert relative_error(total, out.pow(2).sum(1)) < 1e-4
    assert not scratch.counters.any()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_over_slots_of_unequal_length(heads: tuple[int, int]) -> None:
    (count, kv_heads), dim, context = heads, 32, 160
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    keys, values = (rand(3, kv_heads, context, dim).half() for _ in range(2))
    angle = torch.rand(context, dim // 2, generator=generator).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos(), angle.sin()
    sin[:, : dim // 2].neg_()
    slots = torch.tensor([2, 0], device=DEVICE)
    lengths = torch.tensor([0, 7, 150], dtype=torch.int32, device=DEVICE)
    qkv = rand(2, (count + 2 * kv_heads) * dim).half()
    wanted, kept = [], {}
    for row, slot in enumerate(slots.tolist()):
        length = int(lengths[slot])
        split = qkv[row].view(-1, dim).float()
        turned = split * cos[length] + split.roll(dim // 2, dims=-1) * sin[length]
        new_key = turned[count : count + kv_heads, None].half()
        new_value = split[count + kv_heads :, None].half()
        kept[slot] = (new_key, new_value)
        all_keys = torch.cat([keys[slot, :, :length], new_key], dim=1).float()
        all_values = torch.cat([values[slot, :, :length], new_value], dim=1).float()
        wanted.append(
            torch.nn.functional.scaled_dot_product_attention(
                turned[None, :count, None], all_keys[None], all_values[None], enable_gqa=True
            ).flatten()
        )
    before = keys[1].clone()
    out = torch.full((2, count * dim), float("nan"), device=DEVICE)
    scratch = Scratch.empty(2 * count * 16 * (dim + 2), DEVICE)
    Attention(keys, values, cos, sin, count).launch(qkv, slots, lengths, out, scratch)
    assert relative_error(out, torch.stack(wanted)) < TOLERANCE
    for slot, (new_key, new_value) in kept.items():
        length = int(lengths[slot])
        assert relative_error(keys[slot, :, length], new_key[:, 0]) < TOLERANCE
        assert torch.equal(values[slot, :, length], new_value[:, 0])
    assert torch.equal(keys[1], before)
    assert not scratch.counters.any()


def small_llama(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(DEVICE, dtype).eval()


def quantize_linears(model: Any, format_: Format) -> None:
    """Round every linear of the decoder, in place; `dense` leaves them."""
    if format_ == "dense":
        return
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in list(owner.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(owner, name, PackedLinear(rounded(module.weight.float(), format_)))


def rounded(matrix: torch.Tensor, format_: Format) -> Weight:
    bits, group = (8, matrix.shape[1]) if format_ == "int8" else (4, 64)
    grouped = matrix.view(matrix.shape[0], -1, group)
    if format_ == "int8":
        scales = grouped.abs().amax(-1) / 127
        zeros = torch.full_like(scales, 128)
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = (high - low) / 15
        zeros = -low / scales
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return pack(Unpacked(codes.view(matrix.shape).to(torch.uint8), scales, zeros, bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("format_", ["dense", "int8", "int4"])
@torch.no_grad()
def test_decoder_equals_plain_forward(format_: Format, count: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and count > 1 and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    model = small_llama(dtype)
    quantize_linears(model, format_)
    slots = list(range(count))
    cache = SlotCache(model.config, slots=count + 1, context=32, dtype=dtype, device=DEVICE)
    plain = LlamaForward(model.model, module_layers(model.model), model.lm_head, cache)
    generator = torch.Generator().manual_seed(1)
    lengths = dict.fromkeys(slots, 0)
    for slot in slots:
        ids = torch.randint(0, 32, (3 + 5 * slot % 24,), generator=generator).to(DEVICE)
        plain(model.model.embed_tokens(ids), [Segment(slot, 0, len(ids))])
        lengths[slot] = len(ids)
    fast_cache = copy.deepcopy(cache)
    stack = read_stack(copy.deepcopy(model.model), model.lm_head)
    assert stack is not None
    decoder = Decoder(stack, fast_cache, plain.cos, plain.sin)
    for slot in slots:
        decoder.set_length(slot, lengths[slot])
    for _ in range(2):
        tokens = torch.randint(0, 32, (count,), generator=generator).to(DEVICE)
        parts = [Segment(slot, lengths[slot], 1) for slot in slots]
        wanted = plain.logits(plain(model.model.embed_tokens(tokens), parts))
        found = decoder.step(slots, tokens)
        tolerance = 4e-3 if dtype == torch.float16 else 3e-2
        assert relative_error(found, wanted) < tolerance
        for slot in slots:
            lengths[slot] += 1
    assert decoder.lengths.tolist() == [*[lengths[slot] for slot in slots], 0]
