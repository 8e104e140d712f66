"""Folders in which artifacts are built, and the end of those whose builder is dead."""

import logging
import os
import shutil
import time
from pathlib import Path

from pydantic import ValidationError

from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.owner import Owner
from llava_ray.artifacts.storage import Storage, cache_folder

logger = logging.getLogger(__name__)

_OWNER = "owner.json"
_FOREIGN_S = 24 * 3600.0
"""After so long without a sign of life a folder of another machine is nobody's."""


class Staging:
    """An empty local folder, `files`, on the storage's disk if that is local."""

    def __init__(self, storage: Storage, name: str) -> None:
        base = _base(storage)
        self._root = base / f"{name}-{os.urandom(6).hex()}"
        self.files = self._root / "files"
        with disk_errors(str(base)):
            self.files.mkdir(parents=True)
            text = Owner.here().model_dump_json()
            (self._root / _OWNER).write_text(text, encoding="utf-8")

    def touch(self) -> None:
        """Show other machines that its builder lives."""
        os.utime(self._root / _OWNER)

    def remove(self) -> None:
        """Delete what is left of it."""
        shutil.rmtree(self._root, ignore_errors=True)


def remove_dead(storage: Storage) -> None:
    """Delete the staging folders of dead processes of this machine, and old ones of others."""
    base = _base(storage)
    for folder in base.iterdir() if base.is_dir() else ():
        if _is_dead(folder):
            logger.info("removing %s, which a process that died has left", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    note = folder / _OWNER
    try:
        age_s = time.time() - (note if note.exists() else folder).stat().st_mtime
        lives = Owner.model_validate_json(note.read_text(encoding="utf-8")).lives()
    except FileNotFoundError:
        lives = None if folder.exists() else True
    except (OSError, ValidationError):
        lives = None
    return age_s > _FOREIGN_S if lives is None else not lives


def _base(storage: Storage) -> Path:
    return Path(storage.root) / ".staging" if storage.is_local else cache_folder() / "staging"
