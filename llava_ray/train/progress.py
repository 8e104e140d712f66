"""What is said of a run while it lasts."""

import logging
import time

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class Progress:
    """Says now and then how far rank 0 is."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()

    def tell(self, step: int, values: dict[str, float], done: int, left: int) -> None:
        """Log the step, and the time that is left by the pace since the start or resume."""
        now = time.monotonic()
        if now - self._told < _LOG_EVERY_S:
            return
        self._told = now
        logger.info(
            "train: step %d, loss %.4f, %.2f samples/s, about %.0f s left",
            step, values["loss"], values["samples_per_s"], (now - self._began) / done * left,
        )  # fmt: skip
