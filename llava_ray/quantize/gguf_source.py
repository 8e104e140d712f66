"""One full-precision GGUF pair for all variants that are made of a model at a time.

The 7B's takes 14 GB and half a minute; six variants side by side would each write their own.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llava_ray.quantize.gguf_writer import write_pair

TEXT, MMPROJ = "text.gguf", "mmproj.gguf"


@contextmanager
def shared_pair(merged: Path, beside: Path, precision: str) -> Iterator[tuple[Path, Path]]:
    """Give a model's text and mmproj GGUF, in a folder of `beside` that all processes share.

    The first to come writes them while the others wait; the last to leave deletes them. A process
    that is killed leaves them to the next. Raises what `write_pair` raises.
    """
    folder = beside / f"gguf-{_key(merged, precision)}"
    in_use, being_written = folder.with_suffix(".use"), folder.with_suffix(".write")
    with _shared_lock(in_use) as use:
        try:
            # Nobody deletes the second lock while anyone holds the first.
            with being_written.open("w") as writing:
                fcntl.flock(writing, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _write(folder, merged, precision)
            yield folder / TEXT, folder / MMPROJ
        finally:
            # Refused as long as another process uses the pair.
            with suppress(BlockingIOError):
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                being_written.unlink(missing_ok=True)
                in_use.unlink(missing_ok=True)


@contextmanager
def _shared_lock(path: Path) -> Iterator[IO[str]]:
    """Take a lock that many may share; the last of them may delete its file at any time."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is(lock, path):
                yield lock
                return


def _is(lock: IO[str], path: Path) -> bool:
    """Say whether the path still leads to the file that was opened."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def _key(merged: Path, precision: str) -> str:
    stats = [(path.name, path.stat()) for path in sorted(merged.glob("*.safetensors"))]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    seen = repr((precision, str(merged.resolve()), weights))
    return hashlib.sha256(seen.encode()).hexdigest()[:12]


def _write(folder: Path, merged: Path, precision: str) -> None:
    """Write the pair; the folder appears when it is whole."""
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        write_pair(merged, draft / TEXT, draft / MMPROJ, precision=precision)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
