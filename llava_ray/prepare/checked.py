"""Rows with their pictures, read in one place and checked by the whole cluster, through Ray Data.

One task reads rows on the driver's node, where its files are, in portions that depend on the rows
alone; others decode the pictures, wherever there are CPUs. Rows travel as bytes and arrive in their
order, so what is made of them hangs neither on nodes nor on blocks or tries.
"""

import functools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llava_ray.artifacts.storage import Storage
from llava_ray.console import Progress
from llava_ray.errors import LlavaRayError
from llava_ray.prepare.parts import Part
from llava_ray.prepare.pictures import checked, fetched, image_reader
from llava_ray.prepare.rows import Rejection, Row

_PORTION_ROWS, _PORTION_BYTES = 256, 4 * 2**20
"""A portion is full with either."""


def checked_rows(parts: Sequence[Part]) -> Iterator[tuple[Part, Row | Rejection]]:
    """Yield the rows of all sources in their order, good ones with their pictures' files."""
    total = sum(part.reader.num_rows for part in parts)
    progress, done = Progress("prepare", total, "rows"), 0
    for part in parts:
        for portion in portions_of(part):
            for row in pickle.loads(portion):
                yield part, row
                done += 1
            progress.at(done)


def portions_of(part: Part, *, size: int = _PORTION_ROWS) -> Iterator[bytes]:
    """Yield lists of rows as pickle has them; whatever their size, the rows are the same."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    # Not the part itself: its reader may hold all rows.
    read = functools.partial(_read, part.open, part.images, size)
    check = functools.partial(_check, part.images, part.folder, part.config.max_image_pixels)
    portions = ray.data.from_items([0]).map_batches(read, num_cpus=0, label_selector=here)
    portions = portions.map(check)
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


def _check(
    images: str | None, folder: str, max_pixels: int, portion: dict[str, Any]
) -> dict[str, Any]:
    """Read what is not read yet of a portion's pictures, and decode all."""
    rows, read = pickle.loads(portion["rows"]), image_reader(images)
    return {"rows": pickle.dumps(list(checked(rows, read, folder=folder, max_pixels=max_pixels)))}
