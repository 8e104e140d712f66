"""How a process speaks to people: its log, its progress, and an expected failure in one line."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from llava_ray.errors import LlavaRayError

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2


def fail(error: LlavaRayError) -> NoReturn:
    """Print an expected failure in one line and exit with 2."""
    # Ray wraps a task's error in a class that is also a LlavaRayError but prints its traceback.
    cause = getattr(error, "cause", None) or error
    print(f"error: {' '.join(str(cause).split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process by `fail` where the block raises a LlavaRayError."""
    try:
        yield
    except LlavaRayError as error:
        fail(error)


def set_up_logging() -> None:
    """Log with time and level to stderr; also the hook that Ray runs in each worker."""
    logging.basicConfig(
        level=os.environ.get("LLAVA_RAY_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "fsspec", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Progress:
    """Logs how far work is, and about how long the rest takes at its pace so far."""

    def __init__(self, what: str, total: float, unit: str, *, every_s: float = 10) -> None:
        """every_s: the least time between two lines."""
        self.total = total
        self._what, self._unit, self._every_s = what, unit, every_s
        self._start = self._logged = time.monotonic()

    def at(self, done: float, note: str = "") -> None:
        """Log that `done` units are done; `note` stands beside them."""
        now = time.monotonic()
        if now - self._logged < self._every_s:
            return
        self._logged = now
        left_s = (now - self._start) / done * (self.total - done)
        logger.info(
            "%s: %.0f of %.0f %s%s, about %.0f s left",
            self._what, done, self.total, self._unit, note and f", {note}", left_s,
        )  # fmt: skip
