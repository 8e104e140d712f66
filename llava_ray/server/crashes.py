"""How an engine's process died, logged by the process that takes its place."""

import faulthandler
import logging
import os
import re
from pathlib import Path

from llava_ray.resources.crash import Crash, crash_file, read_crash

logger = logging.getLogger(__name__)


def engine_name(model: str) -> str:
    """Name the files of a served model's engine."""
    return f"engine {model}"


def record_crashes(name: str) -> None:
    """Send this process's stack to a file should native code end it; log how an earlier one died.

    name: of the engine, the same for every process that takes its place.
    """
    for path in _files(name):
        crash = read_crash(path)
        if crash is not None:
            path = path.replace(path.with_suffix(".stack"))
            description = Crash(crash.signal, crash.function, path).describe()
            logger.error("%s: its last process %s", name, description)
        elif not Path(f"/proc/{path.stem.rpartition('-')[2]}").exists():
            path.unlink(missing_ok=True)
    path = crash_file(f"{name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.disable()  # Else it would not put its handlers over those that Ray has set since.
    # Never closed: the handler writes to it at the end.
    faulthandler.enable(path.open("w", encoding="utf-8"))


def last_crash(name: str, since: float) -> str | None:
    """Say in one line how an engine's process died on this machine after a time of the epoch."""
    files = [*_files(name), *_files(name, ".stack")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if path.stat().st_mtime >= since and (crash := read_crash(path)):
            return crash.describe()
    return None


def _files(name: str, suffix: str = ".txt") -> list[Path]:
    here = crash_file(name)
    pattern = re.compile(re.escape(here.stem) + r"-\d+" + re.escape(suffix))
    return [path for path in here.parent.glob(f"*{suffix}") if pattern.fullmatch(path.name)]
