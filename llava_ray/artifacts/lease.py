"""One process at a time makes an artifact, on any storage and from any machine.

In `.leases/` lies a small file, `<artifact>.<number>`: its owner writes it anew every
few seconds with a count that grows. Who finds no file creates number 1. Who finds that the owner
is dead (its process is gone from this machine, or the count stood still over several looks, so that
no two clocks are compared) creates the next number. Creating is exclusive where the store has
conditional writes (S3, GCS, disks), so exactly one of several gets it. An owner that finds a larger
number than its own was taken for dead, and must not seal what it made.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import ValidationError

from llava_ray.artifacts.owner import Owner
from llava_ray.artifacts.records import Frozen
from llava_ray.artifacts.storage import Storage
from llava_ray.errors import ArtifactError, LlavaRayError

logger = logging.getLogger(__name__)

_FOLDER = ".leases"
BEAT_S = 5.0
STILL_LOOKS = 12
"""Looks in a row, BEAT_S apart, that show the same count before an owner is taken for dead. Only
looks that succeed count, so a storage that was gone makes nobody dead."""
_TELL_EVERY_S = 60.0


class _Holder(Frozen):
    owner: Owner
    since: str
    count: int
    token: str = ""
    """Random, so that no two holders' files are equal: two threads may be of one process."""


class Lease:
    """Held until `release`; `beat` shows that its owner lives."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Wait until nobody holds it, and take it."""
        self.name, self._storage = name, storage
        self._mine = _Holder(
            owner=Owner.here(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            count=0,
            token=os.urandom(8).hex(),
        )
        self._number = self._take()

    def beat(self) -> None:
        """Write the file anew, unless another run has taken over."""
        if max(self._numbers(), default=0) != self._number:
            return
        self._mine = self._mine.model_copy(update={"count": self._mine.count + 1})
        self._storage.write_text(self._path(self._number), self._mine.model_dump_json(), wait_s=0)

    def check(self) -> None:
        """Raise ArtifactError where another run has taken over."""
        newest = max(self._numbers(), default=0)
        if newest > self._number:
            holder = _parse(self._storage.read_text(self._path(newest)))
            by = holder.owner if holder else "another run"
            raise ArtifactError(
                f"{self.name}: {by} took over, because this process gave no sign of life for a "
                "minute; run the same command again"
            )

    def release(self) -> None:
        """Let the next one in."""
        self._remove(self._number)

    def _take(self) -> int:
        last: tuple[int, str | None] | None = None
        still, told = 0, -_TELL_EVERY_S
        while True:
            number = max(self._numbers(), default=0)
            text = self._storage.read_text(self._path(number)) if number else None
            if number and text is None:
                continue  # It was released since the look before.
            still = still + 1 if (number, text) == last else 0
            last, holder = (number, text), _parse(text)
            dead = holder is not None and holder.owner.lives() is False
            if not number or dead or still >= STILL_LOOKS:
                text = self._mine.model_dump_json()
                if self._storage.create_text(self._path(number + 1), text):
                    self._remove(number)
                    return number + 1
                continue
            if time.monotonic() - told >= _TELL_EVERY_S:
                told = time.monotonic()
                who = f"{holder.owner}, since {holder.since}" if holder else "another run"
                logger.info("%s: waits for who makes it, %s", self.name, who)
            time.sleep(BEAT_S)

    def _numbers(self) -> list[int]:
        split = (file.rpartition(".") for file in self._storage.list_files(_FOLDER))
        return [int(number) for name, _, number in split if name == self.name and number.isdigit()]

    def _remove(self, upto: int) -> None:
        for number in self._numbers():
            if number <= upto:
                self._storage.remove(self._path(number))

    def _path(self, number: int) -> str:
        return f"{_FOLDER}/{self.name}.{number:06d}"


@contextmanager
def held(storage: Storage, name: str, on_beat: Callable[[], None]) -> Iterator[Lease]:
    """Hold the lease of an artifact; a thread beats, and calls `on_beat`, until the end."""
    lease, over = Lease(storage, name), threading.Event()

    def keep() -> None:
        while not over.wait(BEAT_S):
            # A storage that is gone is told by those who need it.
            with contextlib.suppress(OSError, LlavaRayError):
                lease.beat()
                on_beat()

    thread = threading.Thread(target=keep, name=f"lease of {name}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError, LlavaRayError):
            lease.release()


def _parse(text: str | None) -> _Holder | None:
    """Return who holds it, or None for a file that is gone or only half written."""
    try:
        return _Holder.model_validate_json(text) if text else None
    except ValidationError:
        return None
