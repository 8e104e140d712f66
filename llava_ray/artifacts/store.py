"""The folders behind the records: found, built, sealed and checked.

An artifact is a folder `<storage>/<kind>/<id>` whose manifest.json is its record. The id comes
from the settings that made it and its parents' ids, so the same work is found, not redone.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from llava_ray import __version__
from llava_ray.artifacts import lease
from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.identity import REVISIONS, kind_digest
from llava_ray.artifacts.node import MANIFEST as MANIFEST
from llava_ray.artifacts.node import hash_files, kept_text, remember_checked
from llava_ray.artifacts.node import local_folder as local_folder
from llava_ray.artifacts.node import sha256_of as sha256_of
from llava_ray.artifacts.node import verify as verify
from llava_ray.artifacts.records import Record
from llava_ray.artifacts.staging import Staging, remove_dead
from llava_ray.artifacts.storage import Storage
from llava_ray.errors import ArtifactError

logger = logging.getLogger(__name__)

CARD, PASSPORT = "README.md", "passport.json"
"""What stands beside a variant's files, written later than its manifest; nothing loads it."""


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Build(Generic[R]):
    """A folder under construction; `finish` seals it."""

    folder: Path
    found: R | None
    """The artifact, where another run finished it while this one waited: nothing is to be done."""
    storage: Storage
    lease: lease.Lease
    record_type: type[R]
    id: str
    settings: dict[str, Any]
    parents: tuple[str, ...]
    start: float = field(default_factory=time.monotonic)

    def finish(self, record_type: type[R], *, device: str, **fields: Any) -> R:
        """Hash the files, write the manifest last and move the folder to its place.

        Where one is finished already it stays, and its record is returned. Raises StorageError when
        the disk is full or may not be written to.
        """
        assert record_type is self.record_type
        relative = f"{record_type.kind}/{self.id}"
        with disk_errors(self.storage.join(relative)):
            _open_to_others(self.folder)
            record = record_type(
                id=self.id,
                uri=self.storage.join(relative),
                parents=self.parents,
                settings=self.settings,
                code_version=__version__,
                code_revision=REVISIONS.get(record_type.kind, 0),
                code_digest=kind_digest(record_type.kind),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                wall_s=round(time.monotonic() - self.start, 3),
                device=device,
                files=hash_files(self.folder),
                **fields,
            )
            # Written last: a manifest on disk means that the whole folder is there.
            (self.folder / MANIFEST).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        self.lease.check()
        if not self.storage.put_folder(self.folder, relative, last=MANIFEST):
            logger.info("%s is there already; this one is dropped", record.id)
            return read_record(record_type, record.uri)
        if self.storage.is_local:
            remember_checked(record, Path(record.uri))
        logger.info("%s finished in %.1f s: %s", record.id, record.wall_s, record.uri)
        return record


def _open_to_others(folder: Path) -> None:
    """Give files the modes of the umask: safetensors are written for their owner alone."""
    probe = folder / "mode.partial"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        # Who may read a folder may also look into it.
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


class ArtifactStore:
    """Find and build artifacts below one storage root."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)

    def find(self, record_type: type[R], artifact_id: str) -> R | None:
        """Return the finished artifact's record, or None; raises as `read_record`."""
        text = self.storage.read_text(f"{record_type.kind}/{artifact_id}/{MANIFEST}")
        return None if text is None else _parse(record_type, text, artifact_id)

    def find_all(self, record_type: type[R], prefix: str = "") -> list[R]:
        """Return the finished artifacts of a kind whose ids begin so, newest last; as `find`."""
        names = self.storage.list_folders(record_type.kind)
        found = (self.find(record_type, name) for name in names if name.startswith(prefix))
        return sorted((r for r in found if r is not None), key=lambda r: r.created)

    def everything(self) -> list[Record]:
        """Return all finished artifacts, newest last; what cannot be read is left out and named."""
        found: list[Record] = []
        for record_type in Record.__subclasses__():
            for name in self.storage.list_folders(record_type.kind):
                try:
                    record = self.find(record_type, name)
                except ArtifactError as error:
                    logger.warning("%s", error)
                    continue
                found += [record] if record else []
        return sorted(found, key=lambda record: record.created)

    def delete(self, records: Sequence[Record]) -> int:
        """Delete artifacts, those first that were made last; return their bytes."""
        for record in reversed(records):
            folder = f"{record.kind}/{record.id}"
            # The manifest goes first, so that nobody finds the rest.
            self.storage.remove(f"{folder}/{MANIFEST}")
            self.storage.remove(folder)
        return sum(record.size_bytes for record in records)

    @contextmanager
    def build(
        self,
        record_type: type[R],
        artifact_id: str,
        *,
        settings: Mapping[str, Any],
        parents: Sequence[str] = (),
    ) -> Iterator[Build[R]]:
        """Give a staging folder that vanishes unless `finish` is called.

        Until the end no other process makes the same artifact: it waits, and then finds it.
        """
        staging = Staging(self.storage, artifact_id)
        try:
            with lease.held(self.storage, artifact_id, staging.touch) as hold:
                # Also what those left whose end this one waited for.
                remove_dead(self.storage)
                found = self.find(record_type, artifact_id)
                build = Build(
                    staging.files, found, self.storage, hold, record_type, artifact_id,
                    dict(settings), tuple(parents),
                )  # fmt: skip
                with disk_errors(self.storage.uri):
                    yield build
        finally:
            staging.remove()

    def work_uri(self, artifact_id: str) -> str:
        """Return where an unfinished artifact keeps its checkpoints between runs.

        Only who builds the artifact may write there.
        """
        return self.storage.join(f"work/{artifact_id}")

    def remove_work(self, artifact_id: str) -> None:
        """Delete an artifact's checkpoints: it is sealed, and would else be made of them again."""
        self.storage.remove(f"work/{artifact_id}")


def read_record(record_type: type[R], uri: str, *, cached: bool = False) -> R:
    """Read the record of the artifact at a URI.

    cached: take it from this node where it has been read before, without asking the storage.
    Raises ArtifactError when there is none, or when it is not of that kind.
    """
    text = kept_text(uri, MANIFEST) if cached else Storage(uri).read_text(MANIFEST)
    if text is None:
        raise ArtifactError(f"{uri}: no manifest.json; give the folder of a finished artifact")
    return _parse(record_type, text, uri)


def _parse(record_type: type[R], text: str, where: str) -> R:
    try:
        return record_type.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"{where}: manifest.json is not a {record_type.__name__} of this version "
            f"({error.error_count()} mistakes, first: {error.errors()[0]['msg']}); "
            "delete the folder and run the stage again"
        ) from error
