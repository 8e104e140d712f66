"""One full-precision GGUF pair for all variants that are made of a model at a time.

The 7B's takes 14 GB and half a minute; six variants side by side would each write their own.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    with ExitStack() as open_files:
        lock = _share(folder, merged, precision, open_files)
        try:
            yield folder / TEXT, folder / MMPROJ
        finally:
            # Refused as long as another process reads the pair.
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                Path(lock.name).unlink(missing_ok=True)


def _key(merged: Path, precision: str) -> str:
    stats = [(path.name, path.stat()) for path in sorted(merged.glob("*.safetensors"))]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    told = repr((precision, str(merged.resolve()), weights))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _share(folder: Path, merged: Path, precision: str, open_files: ExitStack) -> IO[str]:
    """Return the pair's lock, held together with others, once the pair is there."""
    path = folder.with_suffix(".lock")
    while True:
        lock = open_files.enter_context(path.open("w"))
        # Its last holder may have deleted it while this one waited.
        while _lock(lock, fcntl.LOCK_SH, path):
            if folder.is_dir():
                return lock
            if _lock(lock, fcntl.LOCK_EX, path) and not folder.is_dir():
                _write(folder, merged, precision)


def _lock(lock: IO[str], how: int, path: Path) -> bool:
    """Wait for a lock; return whether the path still leads to it."""
    fcntl.flock(lock, how)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def _write(folder: Path, merged: Path, precision: str) -> None:
    """Write the pair; the folder appears when it is whole."""
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        write_pair(merged, draft / TEXT, draft / MMPROJ, precision=precision)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
