"""A newcomer beside the served model: it answers a share of the requests too, unseen by clients.

Both draw with the same random numbers, so where their answers differ the models differ.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from ray.serve import metrics

from llava_ray.inference.engine import Prompt
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.sampling import SamplingParams
from llava_ray.server.backend import Backend

logger = logging.getLogger(__name__)

_MAX_UNDER_WAY = 4
"""More are not compared: the newcomer must not hold the served model's requests up."""


class Canary:
    """Compare answers of a newcomer with those that were given."""

    def __init__(self, backend: Backend, share: float) -> None:
        self.name = backend.name
        self._backend = backend
        self._share = share
        self._random = random.Random()
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes = metrics.Counter(
            "llava_ray_canary_answers",
            "Answers of the canary, by whether they equal those given",
            tag_keys=("model", "outcome"),  # type: ignore[arg-type]
        )
        self._agreement = metrics.Histogram(
            "llava_ray_canary_agreement",
            "Share of an answer's tokens before the canary's first that differs",
            boundaries=[0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1],
            tag_keys=("model",),
        )

    def wants(self) -> bool:
        """Draw whether the next request is compared."""
        return len(self._tasks) < _MAX_UNDER_WAY and self._random.random() < self._share

    def compare(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        given: Sequence[int],
        *,
        cut: bool,
        timeout_s: float,
    ) -> None:
        """Ask the newcomer in the background and count how far it agrees.

        `cut` says that a stop string ended the given answer, so only that many tokens compare.
        """
        limit = len(given) if cut else sampling.max_tokens
        task = asyncio.create_task(self._compare(prompt, sampling, tuple(given), limit, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        given: tuple[int, ...],
        limit: int,
        timeout_s: float,
    ) -> None:
        try:
            answer = await self._answer(prompt, replace(sampling, max_tokens=limit), timeout_s)
        except ApiError as error:
            logger.warning("canary %s failed: %s", self.name, error)
            self._outcomes.inc(1, {"model": self.name, "outcome": "failed"})
            return
        agreed = agreement(given, answer)
        outcome = "equal" if agreed == 1 else "different"
        self._outcomes.inc(1, {"model": self.name, "outcome": outcome})
        self._agreement.observe(agreed, {"model": self.name})

    async def _answer(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        async with aclosing(self._backend.engine.stream(prompt, sampling, timeout_s)) as chunks:
            async for chunk in chunks:
                ids += tuple(step.token_id for step in chunk.steps)
        return ids


def agreement(given: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens before the first that differs; 1 for two empty answers."""
    longest = max(len(given), len(other))
    same = next(
        (i for i, (a, b) in enumerate(zip(given, other, strict=False)) if a != b),
        min(len(given), len(other)),
    )
    return same / longest if longest else 1.0
