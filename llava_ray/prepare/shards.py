"""Write a data set's files as rows come, keeping a few numbers of each."""

import hashlib
import json
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_ray.prepare.rows import Row

SHARD_BYTES = 2**28
"""A tar with so many bytes of pictures is closed."""


class DatasetWriter:
    """Rows are added in their order; `finish` writes both sides of the split.

    The same rows give the same bytes, whoever checked them and in whatever portions they came.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._lines = (folder / "rows.partial").open("w+b")
        self._shard: BinaryIO | None = None
        self._num_shards = 0
        # Of each row; a list of objects would take ten times as much.
        self._starts, self._first_image = array("q", [0]), array("q", [0])
        self._letters, self.turns, self.shown = array("i"), array("i"), array("q")
        # Of each picture.
        self._shards, self._offsets, self._sizes = array("i"), array("q"), array("i")
        self._known: dict[int, int] = {}
        """The picture of a name and content, by the first bytes of their digest."""

    def close(self) -> None:
        """Close the files, also where the rows did not come to an end."""
        self._lines.close()
        self._close_shard()

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, row: Row, *, folder: str = "") -> None:
        """Write a row and its pictures; those that were written before are not again.

        folder: stands before its pictures' names.
        """
        names = tuple(folder + name for name in row.sample.images)
        sample = replace(row.sample, images=names)
        for picture in zip(names, row.contents, sample.pictures, strict=True):
            self.shown.append(self._picture(*picture))
        line = json.dumps(sample.as_llava(), ensure_ascii=False).encode()
        self._lines.write(line)
        letters = sum(len(turn.text) + len(turn.answer or "") for turn in sample.turns)
        self._starts.append(self._starts[-1] + len(line))
        self._first_image.append(len(self.shown))
        self._letters.append(letters if sample.images else -letters)
        self.turns.append(len(sample.turns))

    def finish(self, train: Iterable[int], test: Iterable[int]) -> None:
        """Write train.json and test.json of rows by their numbers from 0, and their indices."""
        for name, rows in (("train", train), ("test", test)):
            self._write(name, array("q", rows))
        self._close_shard()
        (self._folder / "rows.partial").unlink()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.write(bytes(1024))  # What ends a tar.
            self._shard.close()
        self._shard = None

    def _picture(self, name: str, sha256: str, content: bytes) -> int:
        digest = hashlib.sha256(f"{sha256} {name}".encode()).digest()
        number = self._known.setdefault(int.from_bytes(digest[:8], "big"), len(self._sizes))
        if number < len(self._sizes):
            return number
        if self._shard is not None and self._shard.tell() >= self._shard_bytes:
            self._close_shard()
        if self._shard is None:
            path = self._folder / f"images-{self._num_shards:05d}.tar"
            self._shard, self._num_shards = path.open("wb"), self._num_shards + 1
        member = tarfile.TarInfo(name)
        member.size = len(content)
        # Not by TarFile, which remembers all members.
        self._shard.write(member.tobuf(tarfile.PAX_FORMAT))
        self._shards.append(self._num_shards - 1)
        self._offsets.append(self._shard.tell())
        self._sizes.append(len(content))
        self._shard.write(content)
        self._shard.write(bytes(-len(content) % 512))
        return number

    def _write(self, name: str, rows: Sequence[int]) -> None:
        starts, place = array("q"), 0
        with (self._folder / f"{name}.json").open("wb") as stream:
            for index, row in enumerate(rows):
                place += stream.write(b",\n" if index else b"[\n")
                starts.append(place)
                self._lines.seek(self._starts[row])
                place += stream.write(self._lines.read(self._starts[row + 1] - self._starts[row]))
            stream.write(b"\n]\n" if rows else b"[]\n")
        chosen, first = np.array(rows, np.int64), np.array(self._first_image)
        counts = np.diff(first)[chosen]
        ends = np.concatenate([[0], np.cumsum(counts)])
        where = np.repeat(first[chosen] - ends[:-1], counts) + np.arange(ends[-1])
        picked = np.array(self.shown, np.int64)[where]
        np.savez(
            self._folder / f"{name}.npz",
            start=np.array(starts, np.int64),
            size=np.diff(np.array(self._starts))[chosen],
            letters=np.array(self._letters, np.int32)[chosen],
            turns=np.array(self.turns, np.int32)[chosen],
            images=ends,
            shard=np.array(self._shards, np.int32)[picked],
            offset=np.array(self._offsets, np.int64)[picked],
            bytes=np.array(self._sizes, np.int64)[picked],
        )
