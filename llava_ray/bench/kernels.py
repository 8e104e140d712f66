"""The share of the memory's bandwidth that each kernel reaches on LLaVA-1.5-7B's shapes.

Weights rotate, so that none is read from the cache, and launches are replayed as a graph.
"""

import itertools
import json
import logging
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.inference.torch.kernels.launch import (
    MAX_BATCH,
    Attention,
    GemmBlock,
    GemvBlock,
    Product,
    Scratch,
    Squares,
)
from llava_ray.inference.torch.kernels.weights import Format, Weight, placed, unpack

logger = logging.getLogger(__name__)

SHAPES: dict[str, tuple[int, int, Literal["plain", "residual", "swiglu"]]] = {
    "qkv": (12288, 4096, "plain"),
    "o": (4096, 4096, "residual"),
    "gate_up": (22016, 4096, "swiglu"),
    "down": (4096, 11008, "residual"),
    "lm_head": (32064, 4096, "plain"),
}
FORMATS: tuple[tuple[Format, int], ...] = (
    ("dense", 0),
    ("int8", 0),
    ("int4", 64),
    ("int4", 128),
)
ATTENTION_BLOCKS = (32, 64, 128)
ROTATED_BYTES = 400 * 10**6


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), 10)
    return 2 * source.numel() / seconds


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


class Bench:
    """Buffers for one product on many weights."""

    def __init__(self, name: str, format_: Format, group: int, batch: int) -> None:
        self.rows, self.columns, self.epilogue = SHAPES[name]
        self.batch = batch
        first = random_weight(format_, self.rows, self.columns, group)
        count = min(48, -(-ROTATED_BYTES // first.bytes()))
        self.weights = [first] + [
            random_weight(format_, self.rows, self.columns, group) for _ in range(count - 1)
        ]
        self.gain = torch.rand(self.rows, device="cuda").half()
        self.x = torch.randn(batch, self.columns, device="cuda").half()
        width = self.rows // 2 if self.epilogue == "swiglu" else self.rows
        self.out = torch.zeros(batch, width, device="cuda").half()
        self.scaled = torch.zeros(batch, self.rows, device="cuda").half()
        self.squares = Squares.empty("cuda").of(512 if batch == 1 else 64)
        self.squares.buffer.fill_(self.columns / self.squares.parts)
        self.scratch = Scratch.empty(MAX_BATCH * self.rows * 8 + 65536, 16384, "cuda")

    def run(self, weight: Weight, block: Any = None, pdl: bool = False) -> None:
        """Launch once."""
        norm = self.epilogue != "residual"
        product = Product(weight, self.epilogue, 1e-5, norm, self.gain, "dense", pdl)
        product.launch(self.batch, self.x, self.out, self.squares, self.scratch, self.scaled, block)

    def error(self, block: Any = None) -> float:
        """Return the relative error of the output against a float32 product."""
        weight = self.weights[0]
        x = self.x
        if self.batch > 1:
            self.x = placed(self.x, weight.format)
        self.out.fill_(0 if self.epilogue == "residual" else float("nan"))
        self.run(weight, block)
        self.x = x
        plain = x.float() @ unpack(weight, torch.float32).T
        if self.epilogue == "swiglu":
            plain = torch.nn.functional.silu(plain[:, 0::2]) * plain[:, 1::2]
        return float((self.out.float() - plain).norm() / plain.norm())

    def bandwidth(self, block: Any = None, pdl: bool = False) -> float:
        """Return bytes of weights per second."""
        for weight in self.weights[:2]:
            self.run(weight, block, pdl)

        def run_all() -> None:
            for weight in self.weights:
                self.run(weight, block, pdl)

        seconds = _graph_seconds(run_all)
        return sum(weight.bytes() for weight in self.weights) / seconds

    def library_bandwidth(self) -> float:
        """Return bytes per second of PyTorch's own product, dense weights only."""

        def run_all() -> None:
            for weight in self.weights:
                torch.nn.functional.linear(self.x, weight.data)

        run_all()
        return sum(weight.bytes() for weight in self.weights) / _graph_seconds(run_all)


GEMV_BLOCKS: dict[Format, list[GemvBlock]] = {
    "dense": [GemvBlock(4, 1024, 4), GemvBlock(8, 512, 2), GemvBlock(4, 2048, 8)],
    "int8": [GemvBlock(16, 512, 4), GemvBlock(8, 256, 2), GemvBlock(4, 512, 4)],
    "int4": [GemvBlock(16, 512, 4), GemvBlock(8, 256, 2), GemvBlock(4, 512, 4)],
}
GEMM_BLOCKS: dict[Format, list[GemmBlock]] = {
    "dense": [GemmBlock(32, 128, 2, 5, 2), GemmBlock(64, 128, 2, 5, 4)],
    "int8": [GemmBlock(32, 256, 2, 4, 2), GemmBlock(64, 256, 2, 4, 4)],
    "int4": [GemmBlock(32, 0, 4, 6, 2), GemmBlock(128, 0, 8, 6, 4)],
}


def attention_bandwidth(batch: int, length: int, block: int) -> float:
    """Return bytes of keys and values per second, 32 heads of 128."""
    keys = [torch.randn(9, 32, 2048, 128, device="cuda").half() for _ in range(4)]
    cos = torch.rand(2048, 128, device="cuda").half()
    qkv = torch.randn(batch, 3 * 4096, device="cuda").half()
    slots = torch.arange(batch, device="cuda")
    lengths = torch.full((9,), length, dtype=torch.int32, device="cuda")
    out = torch.zeros(batch, 4096, device="cuda").half()
    scratch = Scratch.empty(MAX_BATCH * 32 * 130, 16384, "cuda")
    layers = [Attention(keys[i], keys[i - 1], cos, cos, 32, block=block) for i in range(4)] * 4

    def run_all() -> None:
        for layer in layers:
            layer.launch(qkv, slots, lengths, out, scratch)

    run_all()
    return len(layers) * batch * length * 2 * 4096 * 2 / _graph_seconds(run_all)


def _graph_seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _median_seconds(graph.replay, 15)


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])


def main(out: Path, variants: bool) -> None:
    """Write one JSON row per kernel and shape; a failing one is recorded with its reason."""
    rows: list[dict[str, Any]] = []
    digest, bandwidth = code_digest("decode_kernels_h100"), copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)

    def record(row: dict[str, Any], work: Callable[[], dict[str, float]]) -> None:
        try:
            row |= work()
        except Exception as error:
            traceback.print_exc(limit=-2)
            row["failed"] = str(error)[:300]
        rows.append(row)
        tree = {"code_digest": digest, "copy_bytes_per_s": bandwidth, "rows": rows}
        out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)

    for batch in (1, 8):
        for length, block in itertools.product((728, 2000), ATTENTION_BLOCKS):
            row = {"kernel": "attention", "batch": batch, "length": length, "block": block}

            def attend(
                batch: int = batch, length: int = length, block: int = block
            ) -> dict[str, float]:
                return {"gb_per_s": attention_bandwidth(batch, length, block) / 1e9}

            record(row, attend)
        for format_, group in FORMATS:
            for name in SHAPES:
                if name == "lm_head" and format_ != "dense":
                    continue
                _bench_shape(record, name, format_, group, batch, variants)


def _bench_shape(
    record: Callable[[dict[str, Any], Callable[[], dict[str, float]]], None],
    name: str,
    format_: Format,
    group: int,
    batch: int,
    variants: bool,
) -> None:
    bench = Bench(name, format_, group, batch)
    row = {"kernel": format_, "group": group, "shape": name, "batch": batch}
    record(dict(row), lambda: {"error": bench.error(), "gb_per_s": bench.bandwidth() / 1e9})
    if format_ == "dense":
        library = {**row, "kernel": "cuBLAS"}
        record(library, lambda: {"gb_per_s": bench.library_bandwidth() / 1e9})
    if name in ("qkv", "lm_head") or group == 128 or not variants:
        return
    if batch == 1:
        record({**row, "pdl": True}, lambda: {"gb_per_s": bench.bandwidth(None, True) / 1e9})
    blocks: list[Any] = [*(GEMV_BLOCKS if batch == 1 else GEMM_BLOCKS)[format_]]
    for block in blocks:
        record(
            {**row, "block": str(block)},
            lambda block=block: {  # type: ignore[misc]
                "error": bench.error(block),
                "gb_per_s": bench.bandwidth(block) / 1e9,
            },
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), variants="--variants" in sys.argv)
