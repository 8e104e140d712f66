"""Rows with their pictures, read in one place and checked by the whole cluster, through Ray Data.

One task reads rows on the driver's node, where its files are, in portions that depend on the rows
alone; others decode the pictures, wherever there are CPUs. Rows travel as bytes and arrive in their
order, so what is made of them hangs neither on nodes nor on blocks or tries.
"""

import functools
import hashlib
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llava_ray.artifacts.storage import Storage
from llava_ray.console import Progress
from llava_ray.errors import LlavaRayError
from llava_ray.prepare.parts import Part
from llava_ray.prepare.pictures import Read, checked, digests, fetched, image_reader
from llava_ray.prepare.rows import Rejection, Row

_PORTION_ROWS, _PORTION_BYTES = 256, 4 * 2**20
"""A portion is full with either."""


Work = Callable[[Iterable[Row | Rejection], Read], Iterable[Any]]
"""What is made of rows with what reads their pictures."""


def content_sha256(part: Part) -> str:
    """Hash a source's rows, and the pictures that lie apart from them."""
    found = part.reader.sha256
    if part.reader.has_image_files:
        whole = hashlib.sha256()
        for digest in _of_pictures(part):
            whole.update(digest)
        found += f" {whole.hexdigest()}"
    return hashlib.sha256(found.encode()).hexdigest()


def _of_pictures(part: Part) -> Iterator[bytes]:
    if part.images is None or Storage(part.images).is_local:
        return digests(part.reader, image_reader(part.images))
    return (digest for portion in portions_of(part, digests) for digest in pickle.loads(portion))


def checked_rows(parts: Sequence[Part]) -> Iterator[tuple[Part, Row | Rejection]]:
    """Yield the rows of all sources in their order, good ones with their pictures' files."""
    total = sum(part.reader.num_rows for part in parts)
    progress, done = Progress("prepare", total, "rows"), 0
    for part in parts:
        most = part.config.max_image_pixels
        work = functools.partial(checked, folder=part.folder, max_pixels=most)
        for portion in portions_of(part, work):
            for row in pickle.loads(portion):
                yield part, row
                done += 1
            progress.at(done)


def portions_of(part: Part, work: Work, *, size: int = _PORTION_ROWS) -> Iterator[bytes]:
    """Yield lists of what is made of rows as pickle has them, the same whatever their size."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    # Not the part itself: its reader may hold all rows.
    read = functools.partial(_read, part.open, part.images, size)
    portions = ray.data.from_items([0]).map_batches(read, num_cpus=0, label_selector=here)
    portions = portions.map(functools.partial(_work, work, part.images))
    portions.context.execution_options.preserve_order = True
    portions.context.enable_progress_bars = False
    try:
        for row in portions.iter_rows():
            yield row["rows"]
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, LlavaRayError):
            raise
        # Ray adds lines of its own.
        raise type(error.cause)(str(error.cause).splitlines()[0]) from error


def _read(
    rows: Callable[[], Iterable[Row | Rejection]], images: str | None, most_rows: int, _: Any
) -> Iterator[dict[str, list[bytes]]]:
    """Yield a source's rows in portions, with those of their pictures that are on this machine."""
    read = image_reader(images)
    here = images is not None and Storage(images).is_local
    portion: list[Row | Rejection] = []
    size = 0
    for row in rows():
        portion.append(fetched(row, read) if here else row)
        if isinstance(portion[-1], Row):
            size += sum(map(len, portion[-1].sample.pictures))
        if len(portion) == most_rows or size >= _PORTION_BYTES:
            yield {"rows": [pickle.dumps(portion)]}
            portion, size = [], 0
    if portion:
        yield {"rows": [pickle.dumps(portion)]}


def _work(work: Work, images: str | None, portion: dict[str, Any]) -> dict[str, Any]:
    """Read what is not read yet of a portion's pictures, and do the work."""
    rows = pickle.loads(portion["rows"])
    return {"rows": pickle.dumps(list(work(rows, image_reader(images))))}
