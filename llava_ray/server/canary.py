"""A newcomer beside the served model: it answers a share of the requests too, unseen by clients.

Both draw with the same random numbers, so where their answers differ the models differ.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import takewhile

from ray.serve import metrics

from llava_ray.errors import ConfigError
from llava_ray.inference.engine import Prompt
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.sampling import SamplingParams
from llava_ray.server.backend import Backend

logger = logging.getLogger(__name__)

_MAX_UNDER_WAY = 4
"""More are not compared: the newcomer must not hold the served model's requests up."""


class Canary:
    """Compare answers of a newcomer with those that were given."""

    def __init__(self, served: Backend, newcomer: Backend, share: float) -> None:
        """Raise ConfigError where the two do not read the same prompts."""
        for name in ("family", "eos_token_id"):
            if getattr(served, name) != getattr(newcomer, name):
                raise ConfigError(
                    f"canary {newcomer.name!r} has {name}={getattr(newcomer, name)}, and "
                    f"{served.name!r} has {getattr(served, name)}: only variants of one base model "
                    "compare"
                )
        self.name = newcomer.name
        self._served, self._newcomer = served, newcomer
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

    def wants(self, backend: Backend) -> bool:
        """Draw whether the next request, which is the backend's, is compared."""
        free = backend is self._served and len(self._tasks) < _MAX_UNDER_WAY
        return free and self._random.random() < self._share

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
        if cut:
            sampling = replace(sampling, max_tokens=len(given))
        task = asyncio.create_task(self._compare(prompt, sampling, tuple(given), timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self, prompt: Prompt, sampling: SamplingParams, given: tuple[int, ...], timeout_s: float
    ) -> None:
        answer: list[int] = []
        stream = self._newcomer.engine.stream(prompt, sampling, timeout_s)
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    answer += [step.token_id for step in chunk.steps]
        except ApiError as error:
            logger.warning("canary %s failed: %s", self.name, error)
            self._outcomes.inc(1, {"model": self.name, "outcome": "failed"})
            return
        agreed = agreement(given, answer)
        outcome = "equal" if agreed == 1 else "different"
        self._outcomes.inc(1, {"model": self.name, "outcome": outcome})
        self._agreement.observe(agreed, {"model": self.name})


def agreement(given: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens before the first that differs; 1 for two empty answers."""
    longest = max(len(given), len(other))
    pairs = zip(given, other, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same / longest if longest else 1.0
