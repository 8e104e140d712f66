"""How a process speaks to people: its log, and an expected failure in one line."""

import logging
import os
import sys

from llava_ray.errors import LlavaRayError

EXIT_USER_ERROR = 2


def fail(error: LlavaRayError) -> None:
    """Print an expected failure in one line and exit with 2."""
    # Ray wraps a task's error in a class that is also a LlavaRayError but prints its traceback.
    cause = getattr(error, "cause", None) or error
    print(f"error: {' '.join(str(cause).split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def set_up_logging() -> None:
    """Log with time and level to stderr; also the hook that Ray runs in each worker."""
    logging.basicConfig(
        level=os.environ.get("LLAVA_RAY_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
