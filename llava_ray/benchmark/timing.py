"""Speed, memory and bandwidth of the process and device at hand."""

import math
import statistics
import time
from collections.abc import Sequence

import torch

from llava_ray.artifacts.records import Spread
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.generate import generate
from llava_ray.inference.sampling import SamplingParams
from llava_ray.models.tensors import wait_for
from llava_ray.resources.memory import host_peak_bytes

COPY_REPEATS = 5


def spread(values: Sequence[float]) -> Spread:
    """Return median, smallest and largest."""
    return Spread(
        median=statistics.median(values), low=min(values), high=max(values), repeats=len(values)
    )


def time_generation(engine: Engine, prompt: Prompt, tokens: int) -> tuple[float, float]:
    """Return seconds to the first token, and tokens per second of the `tokens` after it."""
    sampling = SamplingParams(max_tokens=tokens + 1, ignore_eos=True)
    stamps = [time.perf_counter()]
    stamps += [time.perf_counter() for _ in generate(engine, prompt, sampling)]
    return stamps[1] - stamps[0], (len(stamps) - 2) / (stamps[-1] - stamps[1])


def copy_bytes_per_s(device: str) -> float:
    """Measure the device's memory bandwidth: the best of some copies, reads and writes counted."""
    size = 2**30 if device.startswith("cuda") else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(COPY_REPEATS):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


class PeakMemory:
    """The largest memory that this process takes from now on."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._free = torch.cuda.mem_get_info()[0]

    def read(self) -> int:
        """Return bytes: peak resident memory, or on a GPU peak allocations.

        What other libraries than torch hold there (llama.cpp) is counted as it is now.
        """
        if not self._cuda:
            return host_peak_bytes()
        taken = self._free - torch.cuda.mem_get_info()[0]
        others = max(0, taken - torch.cuda.memory_reserved())
        return int(torch.cuda.max_memory_allocated() + others)
