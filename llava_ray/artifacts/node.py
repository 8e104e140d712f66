"""What one node keeps of artifacts: downloads, and notes of which were checked.

Surprising: a download is only for the first of a node's processes that asks; the others wait at a
file lock and find it. A note holds the sizes and times of the files, so a file that changed is
checked again.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.records import FileEntry, Record
from llava_ray.artifacts.storage import Storage, cache_folder
from llava_ray.errors import ArtifactError

MANIFEST = "manifest.json"


def local_folder(record: Record) -> Path:
    """Return the artifact's folder on this machine's disk, downloaded if needed.

    Every file is checked before its first use there. Raises ArtifactError when none is finished, or
    a file differs from the manifest.
    """
    storage = Storage(record.uri)
    if storage.is_local and not (Path(storage.root) / MANIFEST).is_file():
        raise ArtifactError(
            f"{record.id}: no finished artifact at {storage.root} on this machine; "
            "on several nodes storage.uri must be shared (s3://, gs:// or a network disk)"
        )
    lock = cache_folder() / "locks" / f"{record.id}-{_hex(record.uri)}"
    with disk_errors(str(lock)):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(str(lock)), FileLock(lock):
        if storage.is_local:
            _check_once(record, Path(storage.root))
            return Path(storage.root)
        folder = cached_folder(record.uri)
        if (folder / MANIFEST).is_file():
            try:
                _check_once(record, folder)
                return folder
            except ArtifactError:
                shutil.rmtree(folder)  # Only a copy.
        _download(record, storage, folder)
    return folder


def cached_folder(uri: str) -> Path:
    """Return where this node keeps its copy of the artifact at a remote URI."""
    return cache_folder() / "artifacts" / f"{uri.rpartition('/')[2]}-{_hex(uri)}"


def kept_text(uri: str, name: str) -> str | None:
    """Return the text of a file of a finished artifact, or None where there is none.

    A node that has read it once needs no storage: a finished artifact does not change.
    """
    storage = Storage(uri)
    if storage.is_local:
        return storage.read_text(name)
    note = cache_folder() / "texts" / f"{cached_folder(uri).name}-{name}"
    if note.is_file():
        return note.read_text(encoding="utf-8")
    text = storage.read_text(name)
    if text is not None:
        _write(note, text)
    return text


def remember_checked(record: Record, folder: Path) -> None:
    """Note that every file of a folder is as the manifest says."""
    _write(_note(folder), _state(record, folder))


def verify(record: Record, folder: Path) -> None:
    """Check every file of a folder against the manifest's SHA-256.

    Raises ArtifactError that names the first file that is missing or differs.
    """
    found = hash_files(folder)
    for name, expected in record.files.items():
        if found.get(name) != expected:
            state = "differs from" if name in found else "is missing but is in"
            raise ArtifactError(
                f"{record.id}: {name} {state} the manifest at {folder}; "
                "delete the folder and run the stage again"
            )


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Return size and hash of each file below a folder, its manifest left out."""
    manifest = folder / MANIFEST
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != manifest]
    with ThreadPoolExecutor() as pool:
        return {
            path.relative_to(folder).as_posix(): FileEntry(
                size_bytes=path.stat().st_size, sha256=sha256
            )
            for path, sha256 in zip(paths, pool.map(sha256_of, paths), strict=True)
        }


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(record: Record, storage: Storage, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}")  # Left half done only by who died under the lock.
    with disk_errors(str(part)):
        shutil.rmtree(part, ignore_errors=True)
        storage.get_files("", record.files, part)
        try:
            verify(record, part)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(part), storage.uri)) from error
        (part / MANIFEST).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        part.rename(folder)
    remember_checked(record, folder)


def _check_once(record: Record, folder: Path) -> None:
    note = _note(folder)
    if not note.is_file() or note.read_text(encoding="utf-8") != _state(record, folder):
        verify(record, folder)
        remember_checked(record, folder)


def _state(record: Record, folder: Path) -> str:
    """Return a hash of the manifest and of what `stat` tells of the files."""
    digest = hashlib.sha256(record.model_dump_json().encode())
    for name in record.files:
        try:
            stat = (folder / name).stat()
        except OSError:
            return "a file is missing"  # Never noted: such a folder does not pass.
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write(note: Path, text: str) -> None:
    with disk_errors(str(note)):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{os.getpid()}~")
        draft.write_text(text, encoding="utf-8")
        draft.replace(note)


def _note(folder: Path) -> Path:
    return cache_folder() / "checked" / f"{folder.name}-{_hex(str(folder))}"


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
