"""The folders behind the records: found, built, sealed and checked.

An artifact is a folder `<storage>/<kind>/<id>` whose manifest.json is its record. The id comes
from the settings that made it and its parents' ids, so the same work is found, not redone.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llava_ray import __version__
from llava_ray.artifacts.records import FileEntry, Record
from llava_ray.artifacts.storage import Storage, cache_folder, disk_errors
from llava_ray.errors import ArtifactError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CARD = "README.md"
"""A model card; a variant's is written later than its manifest, and nothing loads it."""


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Build:
    """A folder under construction; `finish` seals it."""

    folder: Path
    storage: Storage
    record_type: type[Record]
    id: str
    settings: dict[str, Any]
    parents: tuple[str, ...]
    start: float = field(default_factory=time.monotonic)

    def finish(self, record_type: type[R], *, device: str, **fields: Any) -> R:
        """Hash the files, write the manifest last and move the folder to its place.

        Raises ResourceError when the disk is full or may not be written to.
        """
        assert record_type is self.record_type
        relative = f"{record_type.kind}/{self.id}"
        with disk_errors(self.storage.join(relative)):
            record = record_type(
                id=self.id,
                uri=self.storage.join(relative),
                parents=self.parents,
                settings=self.settings,
                code_version=__version__,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                wall_s=round(time.monotonic() - self.start, 3),
                device=device,
                files=_hash_files(self.folder),
                **fields,
            )
            # Written last: a manifest on disk means that the whole folder is there.
            (self.folder / MANIFEST).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        self.storage.put_folder(self.folder, relative, last=MANIFEST)
        logger.info("%s finished in %.1f s: %s", record.id, record.wall_s, record.uri)
        return record


class ArtifactStore:
    """Find and build artifacts below one storage root."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)

    def find(self, record_type: type[R], artifact_id: str) -> R | None:
        """Return the finished artifact's record, or None; raises as `read_record`."""
        text = self.storage.read_text(f"{record_type.kind}/{artifact_id}/{MANIFEST}")
        return None if text is None else _parse(record_type, text, artifact_id)

    def latest(self, record_type: type[R]) -> list[R]:
        """Return all finished artifacts of a kind, newest last; for people, never for stages."""
        found = (
            self.find(record_type, name) for name in self.storage.list_folders(record_type.kind)
        )
        return sorted((r for r in found if r is not None), key=lambda r: r.created)

    @contextmanager
    def build(
        self,
        record_type: type[Record],
        artifact_id: str,
        *,
        settings: Mapping[str, Any],
        parents: Sequence[str] = (),
    ) -> Iterator[Build]:
        """Give a staging folder that vanishes unless `finish` is called."""
        folder = self.storage.staging(artifact_id)
        build = Build(
            folder, self.storage, record_type, artifact_id, dict(settings), tuple(parents)
        )
        try:
            with disk_errors(self.storage.uri):
                yield build
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def work_uri(self, artifact_id: str) -> str:
        """Return where an unfinished artifact keeps its checkpoints between runs."""
        return self.storage.join(f"work/{artifact_id}")


def artifact_id(kind: str, settings: Mapping[str, Any], parents: Sequence[str] = ()) -> str:
    """Derive an id from what shapes an artifact: `<kind>-<12 hex digits>`."""
    text = json.dumps([kind, settings, list(parents)], sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def local_folder(record: Record) -> Path:
    """Return the artifact's folder on this machine's disk, downloading and checking it if needed.

    Raises ArtifactError when none is finished, or what was downloaded differs from the manifest.
    """
    storage = Storage(record.uri)
    if storage.is_local:
        folder = Path(storage.root)
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(
                f"{record.id}: no finished artifact at {folder} on this machine; "
                "on several nodes storage.uri must be shared (s3://, gs:// or a network disk)"
            )
        return folder
    folder = cache_folder() / "artifacts" / record.id
    if not (folder / MANIFEST).is_file():
        staging = folder.with_name(f".{folder.name}-{time.time_ns()}")
        storage.get_folder("", staging)
        verify(record, staging)
        if not folder.exists():
            staging.rename(folder)
    return folder


def read_record(record_type: type[R], uri: str) -> R:
    """Read the record of the artifact at a URI.

    Raises ArtifactError when there is none, or when it is not of that kind.
    """
    text = Storage(uri).read_text(MANIFEST)
    if text is None:
        raise ArtifactError(f"{uri}: no manifest.json; give the folder of a finished artifact")
    return _parse(record_type, text, uri)


def verify(record: Record, folder: Path) -> None:
    """Check every file of a folder against the manifest's SHA-256.

    Raises ArtifactError that names the first file that is missing or differs.
    """
    found = _hash_files(folder)
    for name, expected in record.files.items():
        if found.get(name) != expected:
            state = "differs from" if name in found else "is missing but is in"
            raise ArtifactError(
                f"{record.id}: {name} {state} the manifest at {folder}; "
                "delete the folder and run the stage again"
            )


def _parse(record_type: type[R], text: str, where: str) -> R:
    try:
        return record_type.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"{where}: manifest.json is not a {record_type.__name__} of this version "
            f"({error.error_count()} mistakes, first: {error.errors()[0]['msg']}); "
            "delete the folder and run the stage again"
        ) from error


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            size_bytes=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
