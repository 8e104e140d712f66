"""The learning rate as a pure function of the step."""

import math
from typing import Literal

Scheduler = Literal["cosine", "linear", "constant"]


def rate_factor(scheduler: Scheduler, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return what the peak learning rate is multiplied by at a step, counted from 0.

    Source: transformers/optimization.py, get_scheduler (its constant_with_warmup for constant).
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if scheduler == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "linear":
        return max(0.0, 1 - progress)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Return the steps of the warmup, rounded up as transformers does."""
    return math.ceil(ratio * total_steps)
