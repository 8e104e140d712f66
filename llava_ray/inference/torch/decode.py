"""The decode step on a GPU: few fused kernels a layer, replayed as one CUDA graph.

Lengths live on the GPU and grow inside the graph, so that a step needs nothing from the host.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llava_ray.config.train import LINEAR_LAYERS
from llava_ray.inference.torch.cache import SlotCache
from llava_ray.inference.torch.kernels.launch import (
    LEAST_TOKENS,
    MAX_BATCH,
    Attention,
    Epilogue,
    Product,
    Scratch,
    Squares,
    embed,
    gemm_block,
)
from llava_ray.inference.torch.kernels.unpack import unpack_to
from llava_ray.inference.torch.kernels.weights import (
    Format,
    Unsupported,
    Weight,
    concatenated,
    interleaved,
    read_module,
)
from llava_ray.inference.torch.llama import Layer, Projection, read_layers
from llava_ray.inference.torch.prefill import capture

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8, 16, 32, MAX_BATCH)
"""Batch sizes with a graph of their own; others are filled up."""
_HOPPER = (9, 0)


@dataclass
class StackWeights:
    """The language model in kernel layouts; gate's and up's rows alternate."""

    config: Any
    """The LlamaConfig."""
    embeddings: torch.Tensor
    layers: list[Layer[Weight]]
    norm: torch.Tensor
    head: Weight

    def weights(self) -> list[Weight]:
        """Return all matrices."""
        parts = [[layer.qkv, layer.o, layer.gate_up, layer.down] for layer in self.layers]
        return [weight for part in parts for weight in part] + [self.head]

    def bytes(self) -> int:
        """Return the bytes that one decoded token reads."""
        norms = (2 * len(self.layers) + 1) * self.norm.numel() * self.norm.element_size()
        return sum(weight.bytes() for weight in self.weights()) + norms

    def projection(self, weight: Weight) -> Projection:
        """Return x @ weight.T; packed weights are unpacked to a shared buffer first."""
        if weight.format == "dense":
            return lambda x: functional.linear(x, weight.data)
        return lambda x: functional.linear(x, unpack_to(weight, self._buffer))

    @cached_property
    def _buffer(self) -> torch.Tensor:
        size = max(w.rows * w.columns for w in self.weights() if w.format != "dense")
        return torch.empty(size, dtype=self.embeddings.dtype, device=self.embeddings.device)


def read_stack(language_model: Any, lm_head: nn.Module) -> StackWeights | None:
    """Take the weights out of the model's modules, or say which one cannot be and return None."""

    def read(name: str, modules: Sequence[nn.Module]) -> Weight:
        try:
            weight = concatenated([read_module(module) for module in modules])
        except Unsupported as error:
            raise Unsupported(f"{name} has no fast kernel: {error}") from error
        return interleaved(weight) if name.endswith("gate_up") else weight

    try:
        # All are read once before any is taken apart, for the model has to run if one cannot be.
        for _ in read_layers(language_model, read):
            pass
        head = read("lm_head", [lm_head])
    except Unsupported as error:
        logger.warning("slow path: %s", error)
        return None
    layers = []
    # A GPU that holds the model need not have room for a second one.
    for module, layer in zip(language_model.layers, read_layers(language_model, read), strict=True):
        layers.append(layer)
        _drop_linears(module)
    return StackWeights(
        config=language_model.config,
        embeddings=language_model.embed_tokens.weight.detach(),
        layers=layers,
        norm=language_model.norm.weight.detach(),
        head=head,
    )


def _drop_linears(layer: Any) -> None:
    """Free the modules' own weights, which stand in kernel layouts now."""
    for name, _ in list(layer.named_modules()):
        if name.rpartition(".")[2] in LINEAR_LAYERS:
            layer.set_submodule(name, nn.Identity())


class Decoder:
    """Decode up to MAX_BATCH slots a step; `cache` has one spare slot, the last, for padding."""

    def __init__(
        self, stack: StackWeights, cache: SlotCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        self.stack, self.cache, self.cos, self.sin = stack, cache, cos, sin
        self.device = stack.embeddings.device
        self.spare = cache.keys.shape[1] - 1
        packed = any(weight.format != "dense" for weight in stack.weights())
        # Packed weights are multiplied in float16, whatever the model's type.
        self.activations = torch.float16 if packed else stack.embeddings.dtype
        self.lengths = torch.zeros(self.spare + 1, dtype=torch.int32, device=self.device)
        self.batches = [size for below, size in pairwise((0, *BATCHES)) if below < self.spare]
        """Those that the cache's slots can need."""
        tokens = max(self.batches[-1], LEAST_TOKENS)
        blocks = [(weight.rows, gemm_block(weight)) for weight in stack.weights()]
        # Rows are filled up to a whole block.
        products = max(tokens * (rows + block.rows) * block.split for rows, block in blocks)
        attention = MAX_BATCH * stack.config.num_attention_heads * (stack.config.head_dim + 2)
        self.scratch = Scratch.empty(max(products, attention), str(self.device))
        self._graphs: dict[int, _Graph] = {}

    def set_length(self, slot: int, length: int) -> None:
        """Tell the GPU how many tokens a slot holds."""
        self.lengths[slot].fill_(length)

    def step(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each slot; return float32 logits [len(slots), vocab]."""
        parts = [
            self._graph(len(slots[first : first + MAX_BATCH])).replay(
                slots[first : first + MAX_BATCH], tokens[first : first + MAX_BATCH]
            )
            for first in range(0, len(slots), MAX_BATCH)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def kernel_name(self, batch: int) -> str:
        """Say what multiplies the layers' matrices at a batch size."""
        formats = sorted({weight.format for weight in self.stack.weights()[:-1]})
        return f"Triton {'gemv' if batch == 1 else 'gemm'} {'+'.join(formats)}"

    def warm_up(self) -> None:
        """Compile and capture ahead of the first request."""
        for batch in self.batches:
            self._graph(batch)

    def _graph(self, count: int) -> "_Graph":
        batch = next(size for size in self.batches if size >= count)
        if batch not in self._graphs:
            start = time.perf_counter()
            self._graphs[batch] = _Graph(self, batch)
            logger.info("decode graph for %d: %.1f s", batch, time.perf_counter() - start)
        return self._graphs[batch]


class _Graph:
    """All kernels of a step for one batch size."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.decoder, self.batch = decoder, batch
        device, config = decoder.device, decoder.stack.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dtype, model_dtype = decoder.activations, decoder.stack.embeddings.dtype

        def rows(width: int, type_: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(batch, width, dtype=type_, device=device)

        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.slots = torch.full((batch,), decoder.spare, dtype=torch.int64, device=device)
        self.active = torch.zeros(batch, dtype=torch.int32, device=device)
        self.logits = rows(config.vocab_size, torch.float32)
        self.hidden = rows(config.hidden_size, model_dtype)
        self.scaled = rows(config.hidden_size)
        self.qkv = rows((heads + 2 * kv_heads) * config.head_dim)
        self.attended = rows(heads * config.head_dim)
        self.gated = rows(config.intermediate_size)
        self.squares = Squares.empty(str(device))
        # One token's kernels load weights while the one before still runs; those of small batches
        # read activations first, so it slows them.
        on_gpu = device.type == "cuda"
        self._early = batch == 1 and on_gpu and torch.cuda.get_device_capability(device) >= _HOPPER
        self._loaded: tuple[int, ...] = ()
        # Triton's interpreter records nothing.
        self._graph = capture(self._launch) if on_gpu else None

    def replay(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        count = len(slots)
        if self._loaded != tuple(slots):
            padding = self.batch - count
            padded = [*slots, *[self.decoder.spare] * padding]
            self.slots.copy_(torch.tensor(padded))
            self.active.copy_(torch.tensor([1] * count + [0] * padding, dtype=torch.int32))
            self._loaded = tuple(slots)
        self.tokens[:count].copy_(tokens, non_blocking=True)
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        # A copy, since the next step overwrites it.
        return self.logits[:count].clone()

    def _launch(self) -> None:
        decoder, stack = self.decoder, self.decoder.stack
        layers = stack.layers
        squares = embed(
            self.tokens,
            stack.embeddings,
            layers[0].input_norm,
            self.hidden,
            self.scaled,
            self.squares,
            self._order(layers[0].qkv),
            self._early,
        )
        for index, layer in enumerate(layers):
            last = index + 1 == len(layers)
            gain = stack.norm if last else layers[index + 1].input_norm
            reader = stack.head if last else layers[index + 1].qkv
            squares = self._layer(index, layer, gain, reader, squares)
        self._product("plain", stack.head, self.scaled, self.logits, squares)
        decoder.lengths.index_add_(0, self.slots, self.active)

    def _layer(
        self, index: int, layer: Layer[Weight], gain: torch.Tensor, reader: Weight, squares: Squares
    ) -> Squares:
        """`gain` and `reader` are the norm and the weight that come after the layer."""
        decoder = self.decoder
        self._product("plain", layer.qkv, self.scaled, self.qkv, squares)
        Attention(
            decoder.cache.keys[index],
            decoder.cache.values[index],
            decoder.cos,
            decoder.sin,
            decoder.stack.config.num_attention_heads,
            self._order(layer.o),
            self._early,
        ).launch(self.qkv, self.slots, decoder.lengths, self.attended, decoder.scratch)
        squares = self._product(
            "residual", layer.o, self.attended, self.hidden, squares, layer.gate_up, layer.post_norm
        )
        self._product("swiglu", layer.gate_up, self.scaled, self.gated, squares, layer.down)
        return self._product("residual", layer.down, self.gated, self.hidden, squares, reader, gain)

    def _product(
        self,
        epilogue: Epilogue,
        weight: Weight,
        x: torch.Tensor,
        out: torch.Tensor,
        squares: Squares,
        reader: Weight | None = None,
        gain: torch.Tensor | None = None,
    ) -> Squares:
        order = "dense" if reader is None else self._order(reader)
        eps = self.decoder.stack.config.rms_norm_eps
        product = Product(weight, epilogue, eps, gain, order, self._early)
        return product.launch(self.batch, x, out, squares, self.decoder.scratch, self.scaled)

    def _order(self, weight: Weight) -> Format:
        """Return the order in which a weight's kernel wants its input."""
        return "dense" if self.batch == 1 else weight.format
