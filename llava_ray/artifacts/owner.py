"""Which process made a file, and whether it still lives: asked of leases and staging folders."""

import contextlib
import os
import socket
from functools import cache
from pathlib import Path

import psutil

from llava_ray.artifacts.records import Frozen

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Owner(Frozen):
    """A process of one machine."""

    host: str
    """The machine's name, for people."""
    machine: str
    """Also tells a restarted machine, and containers whose process ids are their own."""
    pid: int
    started: float
    """Unix time in seconds: ids of processes come again."""

    @classmethod
    def here(cls) -> "Owner":
        """Return this process."""
        process = psutil.Process()
        return cls(
            host=socket.gethostname(), machine=_machine(), pid=process.pid,
            started=process.create_time(),
        )  # fmt: skip

    def lives(self) -> bool | None:
        """Say whether the process is there; None on another machine, where nobody can tell."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            gone = process.status() == psutil.STATUS_ZOMBIE
            return not gone and abs(process.create_time() - self.started) < 2
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(_BOOT.read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
