"""Choose block shapes and launch the decode step's kernels."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton

from llava_ray.inference.torch.kernels.attention import attention_kernel, embed_kernel
from llava_ray.inference.torch.kernels.gemm import gemm_kernel
from llava_ray.inference.torch.kernels.gemv import gemv_kernel
from llava_ray.inference.torch.kernels.shared import EPILOGUES, INTERPRETED, MAX_PARTS, ORDERS
from llava_ray.inference.torch.kernels.weights import Format, Weight

MAX_BATCH = 64
Epilogue = Literal["plain", "residual", "swiglu"]
LEAST_TOKENS = 8
"""The tokens that the tensor cores take at a time."""


@dataclass(frozen=True)
class Block:
    """Shape of a program."""

    rows: int
    width: int
    """One token: words of a row read at a time, columns for a dense matrix, 128 or 256 per warp, so
    that weights and activations lie alike over threads. Small batches: columns read at a time; for
    int4 it does not count, as a program always takes one group at a time."""
    warps: int = 4
    split: int = 1
    """Programs that share a row's columns; small batches only, as are the stages."""
    stages: int = 4


def gemv_block(weight: Weight) -> Block:
    """Return the shape measured to be fastest on Hopper for one token."""
    return Block(rows=8, width=1024 if weight.format == "dense" else 512)


def gemm_block(weight: Weight) -> Block:
    """Return the shape measured to be fastest on Hopper for small batches."""
    split = 4 if weight.rows <= 4096 else 2 if weight.rows <= 16384 else 1
    return Block(rows=64, width=128, split=2 * split if weight.format == "int4" else split)


@dataclass(frozen=True)
class Squares:
    """Partial sums of squares of the residual stream, float32 [MAX_BATCH, MAX_PARTS]."""

    buffer: torch.Tensor
    parts: int = 0

    @classmethod
    def empty(cls, device: str) -> "Squares":
        """Allocate the buffer."""
        return cls(torch.zeros(MAX_BATCH, MAX_PARTS.value, dtype=torch.float32, device=device))

    def of(self, parts: int) -> "Squares":
        """Return the same buffer, filled with that many parts."""
        assert parts <= MAX_PARTS.value, f"{parts} partial sums"
        return replace(self, parts=parts)


@dataclass(frozen=True)
class Scratch:
    """Where programs of one launch meet: parts of sums, and counters that start and end at 0."""

    parts: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def empty(cls, floats: int, device: str) -> "Scratch":
        """Allocate for the largest launch."""
        counters = torch.zeros(16384, dtype=torch.int32, device=device)
        return cls(torch.empty(floats, dtype=torch.float32, device=device), counters)


@dataclass(frozen=True)
class Product:
    """One matrix product of the decode step with what follows it."""

    weight: Weight
    epilogue: Epilogue
    eps: float = 0.0
    """Of the norm whose factor 1 / rms the input of all but `residual` still lacks."""
    gain: torch.Tensor | None = None
    """residual: the next norm's weights."""
    order: Format = "dense"
    """The format of whoever reads the output."""
    pdl: bool = False

    def launch(
        self,
        batch: int,
        x: torch.Tensor,
        out: torch.Tensor,
        squares: Squares,
        scratch: Scratch,
        scaled: torch.Tensor | None = None,
        block: Block | None = None,
    ) -> Squares:
        """Run it for `batch` tokens; return the sums of squares of the residual stream."""
        weight = self.weight
        shared = {
            "scale_ptr": weight.scale,
            "out_ptr": out,
            "gain_ptr": self.gain,
            "scaled_ptr": scaled,
            "squares_ptr": squares.buffer,
            "rows": weight.rows,
            "parts": squares.parts,
            "eps": self.eps,
            "COLUMNS": weight.columns,
            "GROUP": weight.group,
            "FORMAT": ORDERS[weight.format],
            "EPILOGUE": EPILOGUES[self.epilogue],
            "PARTS": triton.next_power_of_2(max(1, squares.parts)),
            "ASM": not INTERPRETED,
            "PDL": self.pdl,
            **({"launch_pdl": True} if self.pdl else {}),
        }
        block = block or (gemv_block(weight) if batch == 1 else gemm_block(weight))
        shared |= {"BN": block.rows, "num_warps": block.warps}
        tiles = -(-weight.rows // block.rows)
        if batch == 1:
            self._launch_gemv(x, tiles, block, shared)
        else:
            self._launch_gemm(batch, x, scratch, tiles, block, shared)
        return squares.of(tiles) if self.epilogue == "residual" else squares

    def _launch_gemv(
        self, x: torch.Tensor, tiles: int, block: Block, shared: dict[str, Any]
    ) -> None:
        weight = self.weight
        if weight.format == "int4":
            assert weight.scale is not None
            # Scale and zero point as one word.
            shared["scale_ptr"] = weight.scale.view(torch.int32)
        gemv_kernel[(tiles,)](
            x if weight.format == "dense" else x.view(torch.int32),
            weight.data,
            TILE=block.width,
            **shared,
        )

    def _launch_gemm(
        self,
        batch: int,
        x: torch.Tensor,
        scratch: Scratch,
        tiles: int,
        block: Block,
        shared: dict[str, Any],
    ) -> None:
        weight = self.weight
        tokens = max(LEAST_TOKENS, triton.next_power_of_2(batch))
        assert tiles * block.split * block.rows * tokens <= scratch.parts.numel()
        gemm_kernel[(tiles, block.split)](
            x,
            weight.data if weight.format == "dense" else weight.data.view(torch.uint8),
            parts_ptr=scratch.parts,
            counter_ptr=scratch.counters,
            batch=batch,
            BB=tokens,
            BK=block.width,
            SPLIT=block.split,
            STAGES=block.stages,
            OUT_COLUMNS=weight.rows // (2 if self.epilogue == "swiglu" else 1),
            ORDER=ORDERS[self.order],
            **shared,
        )


def embed(
    tokens: torch.Tensor,
    table: torch.Tensor,
    gain: torch.Tensor,
    hidden: torch.Tensor,
    scaled: torch.Tensor,
    squares: Squares,
    order: Format,
    pdl: bool = False,
) -> Squares:
    """Write embeddings [tokens, columns], the first norm's input and the sums of squares."""
    columns = table.shape[1]
    embed_kernel[(tokens.shape[0],)](
        tokens,
        table,
        gain,
        hidden,
        scaled,
        squares.buffer,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ORDER=ORDERS[order],
        PDL=pdl,
        num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )
    return squares.of(1)


@dataclass(frozen=True)
class Attention:
    """Attention of one layer over the static cache."""

    keys: torch.Tensor
    """[slots, kv_heads, context, head_dim]."""
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    heads: int
    order: Format = "dense"
    pdl: bool = False
    block: int = 64
    """Rows of the cache that a program reads at a time."""

    def launch(
        self,
        qkv: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        """Attend for len(slots) tokens; `lengths` holds each slot's tokens before this one."""
        batch = slots.shape[0]
        _, kv_heads, context, head_dim = self.keys.shape
        # Enough programs to fill the GPU.
        split = {1: 16, 2: 8, 4: 4, 8: 4, 16: 2}.get(triton.next_power_of_2(batch), 1)
        assert batch * self.heads * split * (head_dim + 2) <= scratch.parts.numel()
        attention_kernel[(batch, self.heads, split)](
            qkv,
            self.cos,
            self.sin,
            self.keys,
            self.values,
            slots,
            lengths,
            out,
            scratch.parts,
            scratch.counters,
            context,
            head_dim**-0.5,
            HEADS=self.heads,
            KV_HEADS=kv_heads,
            DIM=head_dim,
            BLOCK=self.block,
            SPLIT=split,
            ORDER=ORDERS[self.order],
            PDL=self.pdl,
            num_warps=4,
            **({"launch_pdl": True} if self.pdl else {}),
        )
