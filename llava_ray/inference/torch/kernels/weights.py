"""Weights of linear modules in the layouts that the GPU kernels read, and plain ones for a CPU.

Packed rows are made of superblocks of 8 words of 32 bits. Word u of a superblock holds, for each
of its pairs j, columns 2 * (8 * j + u) and the next one, so that a thread that reads 4 words of
weights reads 4 pairs of activations, 16 bytes each, for every j.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

Format = Literal["dense", "int8", "int4"]

SUPERBLOCK = {"int8": 32, "int4": 64}
"""Columns that 8 words hold."""


@dataclass(frozen=True)
class Weight:
    """Rows of one or more linears, [rows, columns].

    dense: `data` is [rows, columns]. int8 and int4: `data` is int32 words [rows, columns / 4 or 8],
    value = (q - zero) * scale with q unsigned; int8's zero is 128.
    """

    format: Format
    rows: int
    columns: int
    data: torch.Tensor
    scale: torch.Tensor | None = None
    """int8: float16 [rows]; int4: float16 [rows, columns / group, 2], scale and zero."""
    group: int = 0

    def bytes(self) -> int:
        """Return the bytes that one pass over it reads."""
        tensors = [self.data] + ([] if self.scale is None else [self.scale])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Unpacked:
    """Quantized values before packing: (codes - zeros) * scales, per group of columns."""

    codes: torch.Tensor
    """uint8 [rows, columns]."""
    scales: torch.Tensor
    """[rows, groups]; int8 has one group."""
    zeros: torch.Tensor
    bits: int


def column_order(format_: Format, columns: int, device: Any = "cpu") -> torch.Tensor:
    """Return [words, pairs, 2]: the column of each value of each word."""
    pairs = SUPERBLOCK[format_] // 16
    superblock = torch.arange(columns // SUPERBLOCK[format_], device=device)[:, None, None]
    word = torch.arange(8, device=device)[None, :, None]
    pair = superblock * 8 * pairs + torch.arange(pairs, device=device) * 8 + word
    return (2 * pair.flatten(0, 1))[:, :, None] + torch.arange(2, device=device)


def placed(x: torch.Tensor, format_: Format) -> torch.Tensor:
    """Order columns of activations byte by byte of the packed words, as small batches want them.

    int4: the low nibbles' columns first, then the high ones'.
    """
    if format_ == "dense":
        return x
    order = column_order(format_, x.shape[1], x.device)
    if format_ == "int8":
        return x[:, order.flatten()]
    nibbles = torch.cat([order[:, :, 0], order[:, :, 1]], dim=1)
    return torch.cat([x[:, nibbles[:, half::2].flatten()] for half in (0, 1)], dim=1)


def pack(values: Unpacked) -> Weight:
    """Pack codes of at most 8 bits, one scale a row, or of at most 4 bits, scales by group."""
    rows, columns = values.codes.shape
    format_: Format = "int8" if values.bits > 4 else "int4"
    order = column_order(format_, columns, values.codes.device)
    ordered = values.codes[:, order.flatten()].view(rows, *order.shape).to(torch.int32)
    words = torch.zeros(rows, order.shape[0], dtype=torch.int32, device=ordered.device)
    for pair in range(order.shape[1]):
        for odd in range(2):
            shift = 8 * (2 * pair + odd) if format_ == "int8" else 4 * pair + 16 * odd
            words |= ordered[:, :, pair, odd] << shift
    if format_ == "int8":
        scale, group = values.scales[:, 0].half(), columns
    else:
        scale = torch.stack([values.scales, values.zeros], dim=-1).half()
        group = columns // values.scales.shape[1]
    return Weight(format_, rows, columns, words, scale.contiguous(), group)


def unpack(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the plain matrix: the reference for every kernel."""
    if weight.format == "dense":
        return weight.data.to(dtype)
    assert weight.scale is not None
    order = column_order(weight.format, weight.columns, weight.data.device)
    matrix = torch.empty(
        weight.rows, weight.columns, dtype=torch.float32, device=weight.data.device
    )
    width, bits = (4, 0xFF) if weight.format == "int8" else (8, 0xF)
    for index in range(width):
        pair, odd = (index // 2, index % 2) if width == 4 else (index % 4, index // 4)
        shift = 8 * index if width == 4 else 4 * pair + 16 * odd
        matrix[:, order[:, pair, odd]] = ((weight.data >> shift) & bits).float()
    scale = weight.scale.float()
    if weight.format == "int8":
        return ((matrix - 128) * scale[:, None]).to(dtype)
    grouped = matrix.view(weight.rows, -1, weight.group)
    return ((grouped - scale[..., 1:]) * scale[..., :1]).view(matrix.shape).to(dtype)


def concatenated(weights: Sequence[Weight]) -> Weight:
    """Stack rows of one format; raises Unsupported where the formats differ."""
    first = weights[0]
    if len({(w.format, w.columns, w.group, w.data.dtype) for w in weights}) > 1:
        raise Unsupported("it mixes formats, so it cannot be merged")
    scale = None
    if first.scale is not None:
        scale = torch.cat([w.scale for w in weights if w.scale is not None])
    return replace(
        first,
        rows=sum(w.rows for w in weights),
        data=torch.cat([w.data for w in weights]),
        scale=scale,
    )


def interleaved(weight: Weight) -> Weight:
    """Reorder [gate; up] so that row 2i is gate's and row 2i + 1 up's row i."""

    def mix(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(2, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    scale = None if weight.scale is None else mix(weight.scale)
    return replace(weight, data=mix(weight.data), scale=scale)


class PackedLinear(nn.Module):
    """A linear that holds a Weight, for weights that were quantized in this process."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the unpacked weight: slow, and right."""
        return nn.functional.linear(x, unpack(self.packed, x.dtype))


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain linears of `dtype` in the place of all quantized ones, one after the other.

    For CPUs, where every packed layout decodes slower than the weights that it stands for: they
    are unpacked once, at the price of the unquantized model's memory.
    """
    names = [name for name, module in model.named_modules() if type(module).__name__ in _MATRICES]
    for name in names:
        module: Any = model.get_submodule(name)
        weight = _MATRICES[type(module).__name__](module).to(dtype).contiguous()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear)


def _matrix_bnb_4bit(module: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    state.dtype = torch.float32  # of the result, which the stored 16 bits would round
    weight: torch.Tensor = dequantize_4bit(module.weight.data, state)
    return weight


def _matrix_bnb_int8(module: Any) -> torch.Tensor:
    """Return the matrix; activations keep their bits, which bitsandbytes would round to 8 here."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: torch.Tensor = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return weight


_MATRICES: dict[str, Callable[[Any], torch.Tensor]] = {
    "AwqLinear": lambda module: module.dequantize(torch.float32),
    "HQQLinear": lambda module: module.dequantize(),
    "Linear4bit": _matrix_bnb_4bit,
    "Linear8bitLt": _matrix_bnb_int8,
    "PackedLinear": lambda module: unpack(module.packed, torch.float32),
}
"""What a linear multiplies by, as the library that packed it unpacks it."""


class Unsupported(Exception):
    """Why a module has no fast kernel."""


def read_module(module: nn.Module) -> Weight:
    """Return a linear module's weight in a kernel's layout; raises Unsupported with the reason."""
    if isinstance(module, PackedLinear):
        return module.packed
    if getattr(module, "bias", None) is not None:
        raise Unsupported("it has a bias")
    if type(module) is nn.Linear:
        data = module.weight.detach()
        if data.dtype not in (torch.float16, torch.bfloat16):
            raise Unsupported(f"its weights are {data.dtype}")
        if data.shape[1] % 8:
            raise Unsupported(f"{data.shape[1]} columns do not divide by 8")
        return Weight("dense", data.shape[0], data.shape[1], data)
    reader = _READERS.get(type(module).__name__)
    if reader is None:
        raise Unsupported(f"no kernel reads {type(module).__name__}")
    values = reader(module)
    columns = values.codes.shape[1]
    block = SUPERBLOCK["int8" if values.bits > 4 else "int4"]
    if columns % block:
        raise Unsupported(f"{columns} columns do not divide by {block}")
    if values.bits <= 4 and (columns // values.scales.shape[1]) % block:
        raise Unsupported(f"groups of {columns // values.scales.shape[1]} do not divide by {block}")
    return pack(values)


def _read_awq(module: Any) -> Unpacked:
    """AutoAWQ's GEMM layout, which stores all by input row."""
    codes, zeros = (part.t().contiguous() for part in module.steps())
    return Unpacked(codes, module.scales.t(), zeros, 4)


def _read_hqq(module: Any) -> Unpacked:
    """hqq, axis 1: groups lie within a row. Its 1 to 3 bits are stored in 4."""
    meta = module.meta
    bits, group = int(meta["nbits"]), int(meta["group_size"])
    if meta["axis"] != 1 or bits > 4:
        raise Unsupported(f"hqq with {bits} bits on axis {meta['axis']}")
    if meta.get("quant_zero") or meta.get("quant_scale"):
        raise Unsupported("hqq with quantized scales or zero points")
    rows, columns = meta["shape"]
    codes = module.unpack(dtype=torch.uint8)[: rows * columns // group]
    scales, zeros = (meta[name].reshape(rows, -1) for name in ("scale", "zero"))
    return Unpacked(codes.reshape(rows, columns), scales, zeros, 4)


def _read_bnb_int8(module: Any) -> Unpacked:
    """bitsandbytes LLM.int8: rows scaled by their largest value; activations stay 16-bit here."""
    weight = module.weight
    if weight.dtype != torch.int8 or getattr(weight, "SCB", None) is None:
        raise Unsupported("bitsandbytes int8 weights that are not quantized yet")
    codes = (weight.data.to(torch.int16) + 128).to(torch.uint8)
    scales = weight.SCB.float()[:, None] / 127
    return Unpacked(codes, scales, torch.full_like(scales, 128), 8)


_READERS = {
    "AwqLinear": _read_awq,
    "HQQLinear": _read_hqq,
    "Linear8bitLt": _read_bnb_int8,
}
