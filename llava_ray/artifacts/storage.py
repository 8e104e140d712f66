"""Files under one root that is a local path or an fsspec URI such as s3:// or gs://.

Surprising: object stores have no rename, so a folder there is complete only once its last
file is; `put_folder` takes the name of that file.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError, ResourceError

logger = logging.getLogger(__name__)

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}


@contextmanager
def disk_errors(where: str) -> Iterator[None]:
    """Turn a full or read-only disk into a ResourceError that names the place."""
    try:
        yield
    except OSError as error:
        # numpy's words for a write that was cut short, which has no number.
        cut_short = error.errno is None and "requested and" in str(error)
        if cut_short or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left at {where}: free some, or set storage.uri to another disk; "
                "finished artifacts are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"cannot write to {where}: {error.strerror}") from error
        raise


class Storage:
    """Read and write folders below a root URI.

    Paths given to the methods are relative to the root and use forward slashes.
    """

    def __init__(self, uri: str) -> None:
        """Raises ConfigError for a scheme that is unknown or lacks its package."""
        import fsspec

        scheme, separator, rest = uri.partition("://")
        self.is_local = not separator or scheme in ("file", "local")
        if self.is_local:
            uri = str(Path(rest if separator else uri).expanduser().absolute())
        self.uri = uri.rstrip("/")
        self._fs: Any
        if self.is_local:
            self._fs, self.root = fsspec.filesystem("file"), self.uri
            return
        try:
            self._fs, root = fsspec.core.url_to_fs(self.uri)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            cure = f"'pip install llava_ray[{extra}]'" if extra else "its fsspec package"
            raise ConfigError(f"storage.uri {uri!r}: {scheme}:// needs {cure}") from error
        except ValueError as error:
            raise ConfigError(
                f"storage.uri {uri!r}: unknown scheme {scheme!r}; use a path, s3:// or gs://"
            ) from error
        self.root = root.rstrip("/")

    def join(self, relative: str) -> str:
        """Return the URI of a path below the root."""
        return f"{self.uri}/{relative}"

    def read_text(self, relative: str) -> str | None:
        """Return a file's text, or None where there is no such file."""
        try:
            return str(self._fs.cat_file(f"{self.root}/{relative}").decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_text(self, relative: str, text: str) -> None:
        """Write a file in a folder that is there, over an older one of the name."""
        with disk_errors(self.join(relative)):
            self._fs.pipe_file(f"{self.root}/{relative}", text.encode())

    def list_folders(self, relative: str) -> list[str]:
        """Return the sorted names of the folders directly below a path; hidden ones left out."""
        base = f"{self.root}/{relative}"
        found = self._fs.ls(base, detail=False) if self._fs.isdir(base) else []
        names = (Path(path).name for path in found if self._fs.isdir(path))
        return sorted(name for name in names if not name.startswith("."))

    def staging(self, name: str) -> Path:
        """Make an empty local folder to build an artifact in, on the root's disk if it is local."""
        base = Path(self.root) / ".staging" if self.is_local else cache_folder() / "staging"
        folder = base / f"{name}-{os.getpid()}-{os.urandom(4).hex()}"
        with disk_errors(str(base)):
            folder.mkdir(parents=True)
        return folder

    def put_folder(self, folder: Path, relative: str, *, last: str) -> None:
        """Move a staged folder to its place; on object stores the file `last` appears last."""
        if self.is_local:
            target = Path(self.root) / relative
            with disk_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    # Only an unfinished folder can stand here, or an equal one by a racing task.
                    shutil.rmtree(target)
                os.replace(folder, target)
            return
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for path in sorted(files, key=lambda p: p.name == last):
            there = f"{self.root}/{relative}/{path.relative_to(folder).as_posix()}"
            self._fs.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), there)
        shutil.rmtree(folder)

    def get_folder(self, relative: str, target: Path) -> None:
        """Download a folder of a remote root to a local path."""
        assert not self.is_local
        with disk_errors(str(target)):
            target.mkdir(parents=True, exist_ok=True)
            source = f"{self.root}/{relative}".rstrip("/")
            self._fs.get(f"{source}/", f"{target}/", recursive=True)

    def remove(self) -> None:
        """Delete everything below the root; for what is temporary."""
        if self.is_local:
            shutil.rmtree(self.root, ignore_errors=True)
        elif self._fs.exists(self.root):
            self._fs.rm(self.root, recursive=True)


def cache_folder() -> Path:
    """Return the folder for downloads and build caches: $LLAVA_RAY_CACHE or the XDG cache."""
    chosen = os.environ.get("LLAVA_RAY_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_ray"


def check_writable(folder: Path, name: str) -> None:
    """Make a folder, and a file in it for a moment.

    name: the setting that gives the folder. Raises ConfigError where that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{name}: no files can be written to {folder} ({error.strerror}); give another folder"
        ) from error
