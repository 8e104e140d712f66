"""Timings alone on their machine, all other work of the benchmark side by side.

Two lock files order the processes of a machine: who times holds both, and new work waits at the
first until the timing is done.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shared_turn() -> Iterator[None]:
    """Work that may run beside other such work, but never beside a timing; keep it short."""
    with _lock("gate", fcntl.LOCK_EX) as gate, _lock("work", fcntl.LOCK_SH):
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextmanager
def quiet_turn() -> Iterator[None]:
    """Wait until no other process is at work, and keep them waiting meanwhile."""
    with _lock("gate", fcntl.LOCK_EX), _lock("work", fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(name: str, how: int) -> Iterator[int]:
    path = Path(tempfile.gettempdir()) / f"llava_ray_{os.getuid()}_{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)
