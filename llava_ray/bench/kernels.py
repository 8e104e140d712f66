"""The share of the memory's bandwidth that each kernel reaches on LLaVA-1.5-7B's shapes.

python -m llava_ray.bench.kernels OUT.json
Weights rotate, so that none is read from the cache, and launches are replayed as a graph.
"""

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from llava_ray.bench import results
from llava_ray.bench.model import Layout, rounded
from llava_ray.benchmark.timing import copy_bytes_per_s
from llava_ray.inference.torch.kernels.launch import (
    MAX_BATCH,
    Attention,
    Epilogue,
    Product,
    Scratch,
    Squares,
)
from llava_ray.inference.torch.kernels.weights import Weight, pack, placed, unpack
from llava_ray.models.shapes import LLAVA_7B

logger = logging.getLogger(__name__)

_TEXT: dict[str, int] = LLAVA_7B["text_config"]
HIDDEN, INNER, HEADS = (
    _TEXT["hidden_size"], _TEXT["intermediate_size"], _TEXT["num_attention_heads"],
)  # fmt: skip
SHAPES: dict[str, tuple[int, int, Epilogue]] = {
    "qkv": (3 * HIDDEN, HIDDEN, "plain"),
    "o": (HIDDEN, HIDDEN, "residual"),
    "gate_up": (2 * INNER, HIDDEN, "swiglu"),
    "down": (HIDDEN, INNER, "residual"),
    "lm_head": (_TEXT["vocab_size"], HIDDEN, "plain"),
}
LAYOUTS: tuple[Layout, ...] = ("fp16", "int8", "hqq-g64", "awq-g128")
ROTATED_BYTES = 400 * 10**6


def random_weight(layout: Layout, rows: int, columns: int) -> Weight:
    """Draw a weight in a kernel's layout."""
    # Small, so that swiglu's products stay within fp16.
    matrix = 0.1 * torch.randn(rows, columns, device="cuda")
    if layout == "fp16":
        return Weight("dense", rows, columns, matrix.half())
    return pack(rounded(matrix, layout))


def product_rows(name: str, layout: Layout, batch: int) -> Iterator[dict[str, Any]]:
    """Measure one product on many weights, beside PyTorch's own where they are dense."""
    rows, columns, epilogue = SHAPES[name]
    first = random_weight(layout, rows, columns)
    count = min(48, -(-ROTATED_BYTES // first.bytes()))
    weights = [first, *(random_weight(layout, rows, columns) for _ in range(count - 1))]
    gain = torch.rand(rows, device="cuda").half()
    x = torch.randn(batch, columns, device="cuda").half()
    out = torch.zeros(batch, rows // 2 if epilogue == "swiglu" else rows, device="cuda").half()
    scaled = torch.zeros(batch, rows, device="cuda").half()
    squares = Squares.empty("cuda").of(512 if batch == 1 else 64)
    squares.buffer.fill_(columns / squares.parts)
    scratch = Scratch.empty(MAX_BATCH * rows * 8 + 65536, "cuda")

    def launch(weight: Weight, x: torch.Tensor) -> None:
        product = Product(weight, epilogue, 1e-5, gain)
        product.launch(batch, x, out, squares, scratch, scaled)

    def gb_per_s(run: Callable[[Weight], Any]) -> float:
        seconds = _seconds(lambda: [run(weight) for weight in weights])
        return sum(weight.bytes() for weight in weights) / seconds / 1e9

    launch(first, placed(x, first.format) if batch > 1 else x)
    plain = x.float() @ unpack(first, torch.float32).T
    if epilogue == "swiglu":
        plain = torch.nn.functional.silu(plain[:, 0::2]) * plain[:, 1::2]
    error = float((out.float() - plain).norm() / plain.norm())
    group = first.group if first.format == "int4" else 0
    row = {"kernel": first.format, "group": group, "shape": name, "batch": batch}
    yield row | {"error": error, "gb_per_s": gb_per_s(lambda weight: launch(weight, x))}
    if layout == "fp16":
        linear = gb_per_s(lambda weight: torch.nn.functional.linear(x, weight.data))
        yield row | {"kernel": "cuBLAS", "gb_per_s": linear}


def attention_gb_per_s(batch: int, length: int) -> float:
    """Return gigabytes of keys and values per second, of 7B's heads."""
    size = HIDDEN // HEADS
    keys = [torch.randn(9, HEADS, 2048, size, device="cuda").half() for _ in range(4)]
    cos = torch.rand(2048, size, device="cuda").half()
    qkv = torch.randn(batch, 3 * HIDDEN, device="cuda").half()
    slots = torch.arange(batch, device="cuda")
    lengths = torch.full((9,), length, dtype=torch.int32, device="cuda")
    out = torch.zeros(batch, HIDDEN, device="cuda").half()
    scratch = Scratch.empty(MAX_BATCH * HEADS * (size + 2), "cuda")
    layers = [Attention(keys[i], keys[i - 1], cos, cos, HEADS) for i in range(4)] * 4
    read = len(layers) * batch * length * 2 * HIDDEN * 2

    def run() -> None:
        for layer in layers:
            layer.launch(qkv, slots, lengths, out, scratch)

    return read / _seconds(run) / 1e9


def _seconds(run: Callable[[], Any]) -> float:
    # It launches on a stream of its own, which does not wait for the tensors' first values.
    torch.cuda.synchronize()
    milliseconds: float = do_bench_cudagraph(run, rep=50, return_mode="median")
    return milliseconds / 1000


def measure() -> Iterator[dict[str, Any]]:
    """Measure each kernel on each shape; yield a row for it."""
    for batch in (1, 8):
        for length in (728, 2000):
            row = {"kernel": "attention", "batch": batch, "length": length}
            yield row | {"gb_per_s": attention_gb_per_s(batch, length)}
        for layout, name in itertools.product(LAYOUTS, SHAPES):
            if name == "lm_head" and layout != "fp16":
                continue
            yield from product_rows(name, layout, batch)


def main(out: Path) -> None:
    """Measure all and write a JSON row for each."""
    tree: dict[str, Any] = {"copy_bytes_per_s": copy_bytes_per_s("cuda"), "rows": []}
    for row in measure():
        logger.info("%s", json.dumps(row))
        tree["rows"].append(row)
        results.write(out, "decode_kernels_h100", tree, "cuda")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]))
