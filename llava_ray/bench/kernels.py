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
from llava_ray.benchmark.timing import copy_bytes_per_s
from llava_ray.inference.torch.kernels.launch import (
    MAX_BATCH,
    Attention,
    Epilogue,
    Product,
    Scratch,
    Squares,
)
from llava_ray.inference.torch.kernels.weights import Format, Weight, placed, unpack
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
FORMATS: list[tuple[Format, int]] = [("dense", 0), ("int8", 0), ("int4", 64), ("int4", 128)]
"""With the columns of a group."""
ROTATED_BYTES = 400 * 10**6


def random_weight(format_: Format, rows: int, columns: int, group: int) -> Weight:
    """Draw a weight in a kernel's layout."""
    if format_ == "dense":
        data = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
        return Weight("dense", rows, columns, data)
    words = columns // (4 if format_ == "int8" else 8)
    data = torch.randint(-(2**31), 2**31, (rows, words), device="cuda").to(torch.int32)
    if format_ == "int8":
        scale = torch.rand(rows, device="cuda").half() * 0.01 + 0.001
        return Weight("int8", rows, columns, data, scale, columns)
    scale = torch.rand(rows, columns // group, 2, device="cuda").half()
    scale = scale * torch.tensor([0.05, 15.0], device="cuda").half()
    return Weight("int4", rows, columns, data, scale, group)


def product_rows(name: str, format_: Format, group: int, batch: int) -> Iterator[dict[str, Any]]:
    """Measure one product on many weights, beside PyTorch's own where they are dense."""
    rows, columns, epilogue = SHAPES[name]
    first = random_weight(format_, rows, columns, group)
    count = min(48, -(-ROTATED_BYTES // first.bytes()))
    weights = [first, *(random_weight(format_, rows, columns, group) for _ in range(count - 1))]
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

    launch(first, placed(x, format_) if batch > 1 else x)
    plain = x.float() @ unpack(first, torch.float32).T
    if epilogue == "swiglu":
        plain = torch.nn.functional.silu(plain[:, 0::2]) * plain[:, 1::2]
    error = float((out.float() - plain).norm() / plain.norm())
    row = {"kernel": format_, "group": group, "shape": name, "batch": batch}
    yield row | {"error": error, "gb_per_s": gb_per_s(lambda weight: launch(weight, x))}
    if format_ == "dense":
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
        for (format_, group), name in itertools.product(FORMATS, SHAPES):
            if name == "lm_head" and format_ != "dense":
                continue
            yield from product_rows(name, format_, group, batch)


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
