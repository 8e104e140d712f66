"""A prepared data set, read row by row from where each lies.

train.json and test.json are LLaVA JSON, a row a line. The pictures lie in images-*.tar, each once,
by the names that rows call them by. train.npz and test.npz say of each row where it and its
pictures are, so that nobody reads a whole file to have one row.
"""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import local_folder
from llava_ray.errors import ArtifactError, DataError
from llava_ray.models.conversation import Sample

Numbers = NDArray[np.integer[Any]]
"""One for each row."""


class Split:
    """The rows of one side of a data set."""

    def __init__(self, storage: Storage, name: str) -> None:
        """name: `train` or `test`. Raises ArtifactError where there is no index of it."""
        self._storage, self._name = storage, name
        content = storage.read_bytes(f"{name}.npz")
        if content is None:
            raise ArtifactError(f"{storage.uri}: no {name}.npz; give a finished data set")
        self._index: dict[str, Numbers] = dict(np.load(io.BytesIO(content), allow_pickle=False))
        self.letters = self._index["letters"]
        """Of each row's turns, negative where it shows no picture."""
        self.num_images = np.diff(self._index["images"])
        """That each row shows."""
        self.turns, self.text_bytes = self._index["turns"], self._index["size"]
        """How many each row has, and the bytes of its text at most."""
        pictures = np.concatenate([[0], np.cumsum(self._index["bytes"])])[self._index["images"]]
        self.num_bytes = self._index["size"] + np.diff(pictures)
        """That reading each row takes."""

    def __len__(self) -> int:
        return len(self.letters)

    def row(self, index: int) -> Sample:
        """Read a row without its pictures; raises DataError for what is no LLaVA JSON."""
        start, size = (int(self._index[name][index]) for name in ("start", "size"))
        line = self._part(f"{self._name}.json", start, size)
        try:
            return Sample.from_llava(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{self._storage.uri}/{self._name}.json: no LLaVA JSON at byte {start} ({error})"
            ) from error

    def read(self, index: int) -> Sample:
        """Read a row with its pictures' files."""
        shown = slice(*self._index["images"][index : index + 2])
        places = (self._index[name][shown].tolist() for name in ("shard", "offset", "bytes"))
        files = (
            self._part(f"images-{shard:05d}.tar", offset, size)
            for shard, offset, size in zip(*places, strict=True)
        )
        return replace(self.row(index), pictures=tuple(files))

    def _part(self, name: str, start: int, size: int) -> bytes:
        try:
            found = self._storage.read_range(name, start, size)
        except FileNotFoundError:
            found = b""
        if len(found) < size:
            raise DataError(
                f"{self._storage.uri}/{name}: no {size} bytes from {start} on: delete the data set "
                "and prepare again"
            )
        return found

    def first(self, count: int) -> list[Sample]:
        """Read the first rows with their pictures."""
        return [self.read(index) for index in range(min(count, len(self)))]


def open_split(dataset: DatasetRecord, name: str, *, cache_bytes: int = 0) -> Split:
    """Return one side of a data set; see `storage_of`."""
    return Split(storage_of(dataset, cache_bytes=cache_bytes), name)


def storage_of(dataset: DatasetRecord, *, cache_bytes: int = 0) -> Storage:
    """Return where to read a data set from; its files are checked if they are on this node.

    cache_bytes: data sets of at most so many bytes are downloaded to this node once; of larger ones
    each row is read by range where it lies.
    """
    storage = Storage(dataset.uri)
    if storage.is_local or dataset.size_bytes <= cache_bytes:
        return Storage(str(local_folder(dataset)))
    return storage
