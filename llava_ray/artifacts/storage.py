"""Files under one root that is a local path or an fsspec URI such as s3:// or gs://.

Surprising: object stores have no rename, so a folder there is complete only once its last
file is; `put_folder` takes the name of that file.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_ray.artifacts.faults import disk_errors, is_missing_bucket, missing_bucket, patiently
from llava_ray.errors import ConfigError

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
_CONNECTIONS = 64
_AT_ONCE = 1024
"""Files of one bulk call; where a server goes away, no more than these are sent again."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            # botocore's own default is 10 connections.
            "max_pool_connections": _CONNECTIONS,
            # s3fs's own 5 s are short where many files keep both sides busy.
            "connect_timeout": 20,
            # A server that is gone for longer is waited for by `patiently`.
            "retries": {"mode": "standard", "max_attempts": 3},
        }
    },
}
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}
"""Stores without folders: making one there would make a missing bucket."""


class Storage:
    """Read and write folders below a root URI.

    Paths given to the methods are relative to the root and use forward slashes. All methods raise
    ConfigError for a missing bucket and for credentials that are missing or refused, StorageError
    for a disk that is full and for a server that is gone for faults.GONE_S.
    """

    def __init__(self, uri: str, *, setting: str = "storage.uri") -> None:
        """Raises ConfigError for a scheme that is unknown or lacks its package.

        setting: the key of the config that names the URI, for errors.
        """
        import fsspec

        scheme, separator, rest = uri.partition("://")
        if separator and not rest.strip("/"):
            raise ConfigError(f"{setting} {uri!r}: nothing stands behind {scheme}://")
        self.is_local = not separator or scheme in ("file", "local")
        if self.is_local:
            uri = str(Path(rest if separator else uri).expanduser().absolute())
        self.uri, self._setting = uri.rstrip("/"), setting
        self._in_bucket = not self.is_local and scheme in _BUCKETS
        self._fs: Any
        if self.is_local:
            self._fs, self.root = fsspec.filesystem("file"), self.uri
            return
        try:
            # Others write there too, so no listing is true for long.
            self._fs, root = fsspec.core.url_to_fs(
                self.uri, use_listings_cache=False, **_OPTIONS.get(scheme, {})
            )
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            cure = f"'pip install llava_ray[{extra}]'" if extra else "its fsspec package"
            raise ConfigError(f"{setting} {uri!r}: {scheme}:// needs {cure}") from error
        except Exception as error:  # Each file system raises its own.
            if not isinstance(error, ValueError) or "Protocol" not in str(error):
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise ConfigError(f"{setting} {uri!r} cannot be opened ({reason})") from error
            raise ConfigError(
                f"{setting} {uri!r}: unknown scheme {scheme!r}; use a path, s3:// or gs://"
            ) from error
        self.root = root.rstrip("/")

    def _call(self, method: str, *arguments: Any, wait_s: float | None = None, **named: Any) -> Any:
        def call() -> Any:
            return getattr(self._fs, method)(*arguments, **named)

        if not self.is_local:
            return patiently(call, self.uri, wait_s=wait_s, setting=self._setting)
        with disk_errors(self.uri):
            return call()

    def check(self) -> None:
        """Raise ConfigError where a remote root cannot be read, or its bucket is not there."""
        if self._in_bucket:
            self.read_text("manifest.json")
            if not self._call("exists", self.root.partition("/")[0]):
                raise missing_bucket(f"{self._setting} {self.uri!r}")

    def join(self, relative: str) -> str:
        """Return the URI of a path below the root."""
        return f"{self.uri}/{relative}"

    def read_text(self, relative: str) -> str | None:
        """Return a file's text, or None where there is no such file."""
        found = self.read_bytes(relative)
        return None if found is None else found.decode("utf-8")

    def read_bytes(self, relative: str) -> bytes | None:
        """Return a file's content, or None where there is no such file."""
        try:
            return bytes(self._call("cat_file", f"{self.root}/{relative}"))
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._in_bucket and is_missing_bucket(error):
                raise missing_bucket(f"{self._setting} {self.uri!r}") from error
            return None

    def read_range(self, relative: str, start: int, size: int) -> bytes:
        """Return a part of a file; raises FileNotFoundError where there is no such file."""
        path = f"{self.root}/{relative}"
        return bytes(self._call("cat_file", path, start=start, end=start + size))

    def write_text(self, relative: str, text: str, *, wait_s: float | None = None) -> None:
        """Write a file in a folder that is there, over an older one of the name.

        wait_s: how long a server may be gone; default faults.GONE_S.
        """
        path = f"{self.root}/{relative}"
        if self.is_local:
            # Renamed, so that nobody reads half of it.
            draft = f"{path}.{os.urandom(4).hex()}~"
            self._call("pipe_file", draft, text.encode())
            os.replace(draft, path)
        else:
            self._call("pipe_file", path, text.encode(), wait_s=wait_s)

    def create_text(self, relative: str, text: str) -> bool:
        """Write a file where there is none of the name; return False where there is one."""
        path = f"{self.root}/{relative}"
        self._make_folders([path])
        try:
            if self.is_local:
                with disk_errors(path), Path(path).open("x", encoding="utf-8") as stream:
                    stream.write(text)
            else:
                self._call("pipe_file", path, text.encode(), mode="create")
        except FileExistsError:
            # It may be ours, of a call whose answer was lost.
            return self.read_text(relative) == text
        return True

    def list_folders(self, relative: str) -> list[str]:
        """Return the sorted names of the folders directly below a path; hidden ones left out."""
        return [name for name in self._list(relative, "directory") if not name.startswith(".")]

    def list_files(self, relative: str) -> list[str]:
        """Return the sorted names of the files directly below a path."""
        return self._list(relative, "file")

    def all_files(self) -> list[str]:
        """Return the sorted paths of all files below the root; it may be a file itself."""
        found = self._call("find", self.root)
        return sorted(str(path).removeprefix(self.root).lstrip("/") for path in found)

    def _list(self, relative: str, kind: str) -> list[str]:
        try:
            found = self._call("ls", f"{self.root}/{relative}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(Path(entry["name"]).name for entry in found if entry["type"] == kind)

    def put_folder(self, folder: Path, relative: str, *, last: str) -> bool:
        """Move a local folder to its place; on object stores the file `last` appears last.

        A finished folder is never replaced, someone may be reading it: where there is one, return
        False and leave `folder` as it is.
        """
        if self.read_text(f"{relative}/{last}") is not None:
            return False
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        if not self.is_local:
            self._put(folder, relative, [name for name in names if name != last])
            text = (folder / last).read_text(encoding="utf-8")
            return self.create_text(f"{relative}/{last}", text)
        target = Path(self.root) / relative
        with disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(target)
            except OSError:
                if (target / last).is_file():
                    return False
                shutil.rmtree(target)  # Unfinished, so nobody's.
                folder.rename(target)
        return True

    def _put(self, folder: Path, relative: str, names: list[str]) -> None:
        there = [f"{self.root}/{relative}/{name}" for name in names]
        self._make_folders(there)
        here = [str(folder / name) for name in names]
        for first in range(0, len(names), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            self._call("put", here[part], there[part])

    def get_files(self, relative: str, names: Iterable[str], target: Path) -> None:
        """Download files of a folder of a remote root into a local folder."""
        assert not self.is_local
        names = list(names)
        with disk_errors(str(target)):
            target.mkdir(parents=True, exist_ok=True)
            base = f"{self.root}/{relative}".rstrip("/")
            for first in range(0, len(names), _AT_ONCE):
                part = names[first : first + _AT_ONCE]
                there = [f"{base}/{name}" for name in part]
                self._call("get", there, [str(target / name) for name in part])

    def remove(self, relative: str = "") -> None:
        """Delete a file, or everything below a path; for what is temporary."""
        path = f"{self.root}/{relative}".rstrip("/")
        if self.is_local and Path(path).is_dir():
            shutil.rmtree(path, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", path, recursive=True)

    def _make_folders(self, paths: Iterable[str]) -> None:
        for folder in () if self._in_bucket else {path.rpartition("/")[0] for path in paths}:
            self._call("makedirs", folder, exist_ok=True)


def cache_folder() -> Path:
    """Return the folder for downloads and build caches: $LLAVA_RAY_CACHE or the XDG cache."""
    chosen = os.environ.get("LLAVA_RAY_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_ray"


def check_empty(folder: Path) -> None:
    """Raise ConfigError for a folder that holds something, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: give an empty folder")


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
