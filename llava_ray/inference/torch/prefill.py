"""Prompts on a GPU: image encoder and prefill, each replayed as a CUDA graph.

Launched one by one, the thousand kernels of a prefill keep the host busy for longer than the GPU.
Surprising: a graph fills the cache's spare slot, whose rows are then copied to the prompt's own,
since a graph's addresses are fixed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_ray.inference.torch.cache import Segment, SlotCache
from llava_ray.inference.torch.llama import LlamaForward

STEP = 64
"""Prompt lengths are rounded up to it; rows beyond the prompt come after it, so none sees them."""

Work = Callable[[torch.Tensor], torch.Tensor]


def capture(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Run once, to compile and to allocate what a graph must not; then record."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph


class Recorded:
    """A function of one tensor of a fixed shape, recorded as a CUDA graph."""

    def __init__(self, work: Work, shape: Sequence[int], dtype: torch.dtype, pool: Any) -> None:
        self._input = torch.zeros(*shape, dtype=dtype, device="cuda")

        def run() -> None:
            self._output = work(self._input)

        self._graph = capture(run, pool)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Run on the first rows; what is behind them keeps an earlier call's values.

        The result is overwritten by the next call.
        """
        self._input[: value.shape[0]].copy_(value)
        self._graph.replay()
        return self._output


class PrefillGraphs:
    """Graphs of the prefill by rounded length, and of the image encoder for one image."""

    def __init__(self, forward: LlamaForward, cache: SlotCache, encode: Work) -> None:
        self._forward, self._cache, self._encode = forward, cache, encode
        self._spare = cache.keys.shape[1] - 1
        self._pool = torch.cuda.graph_pool_handle()
        self._by_length: dict[int, Recorded] = {}
        self._encoder: Recorded | None = None

    def prefill(self, hidden: torch.Tensor, slot: int) -> torch.Tensor:
        """Fill a slot from its start; return what `LlamaForward` does, until the next call."""
        count = hidden.shape[0]
        output = self._graph(count, hidden.dtype)(hidden)
        for cached in (self._cache.keys, self._cache.values):
            cached[:, slot, :, :count] = cached[:, self._spare, :, :count]
        return output[:count]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of [1, 3, size, size], until the next call."""
        if self._encoder is None:
            self._encoder = Recorded(self._encode, pixels.shape, pixels.dtype, self._pool)
        return self._encoder(pixels)

    def warm_up(self, counts: Sequence[int], dtype: torch.dtype) -> None:
        """Record the graphs of these prompt lengths ahead of the first request."""
        for count in counts:
            self._graph(count, dtype)

    def _graph(self, count: int, dtype: torch.dtype) -> Recorded:
        length = min(-(-count // STEP) * STEP, self._cache.keys.shape[3])
        if length not in self._by_length:
            parts = [Segment(self._spare, 0, length)]
            shape = (length, self._forward.config.hidden_size)
            self._by_length[length] = Recorded(
                lambda hidden: self._forward(hidden, parts), shape, dtype, self._pool
            )
        return self._by_length[length]
