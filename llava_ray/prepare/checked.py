"""Rows with their pictures, read in one place and checked by the whole cluster, through Ray Data.

One task reads rows on the driver's node, where its files are, in portions that depend on the rows
alone; others decode the pictures, wherever there are CPUs. Files of a cluster's only node are not
sent: the tasks stay there and read them. Rows travel as bytes and arrive in their order, so what is
made of them hangs neither on nodes nor on blocks or tries.
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
from llava_ray.prepare.pictures import (
    Read,
    checked,
    digest,
    fetched,
    image_reader,
    in_order,
    joined,
)
from llava_ray.prepare.rows import Rejection, Row

_PORTION_ROWS, _PORTION_BYTES = 64, 16 * 2**20
"""A portion is full with either."""
_FEW_ROWS = 4096
"""Whose files are hashed in the time that tasks take to start."""

Work = Callable[[Row | Rejection, Read], Any]
"""What is made of a row with what reads its pictures."""


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
    if part.has_files_here and (part.reader.num_rows <= _FEW_ROWS or not stays_here()):
        read = image_reader(part.images)
        return in_order(lambda row: digest(row, read), part.reader)
    return _each(portions_of(part, digest))


def _each(portions: Iterable[bytes]) -> Iterator[Any]:
    return (each for portion in portions for each in pickle.loads(portion))


def checked_rows(parts: Sequence[Part]) -> Iterator[tuple[Part, Row | Rejection]]:
    """Yield the rows of all sources in their order, good ones with their pictures' files.

    Tasks say what they found; files that lie on this node are read here once more, which costs less
    than to send them back.
    """
    total = sum(part.reader.num_rows for part in parts)
    progress, done = Progress("prepare", total, "rows"), 0
    for part in parts:
        work = functools.partial(
            checked, max_pixels=part.config.max_image_pixels, with_files=not part.has_files_here
        )
        read, found = image_reader(part.images), _each(portions_of(part, work))
        pairs = zip(part.reader, found, strict=True)
        for row in in_order(functools.partial(joined, read), pairs):
            yield part, row
            done += 1
            progress.at(done)


def portions_of(part: Part, work: Work, *, size: int = _PORTION_ROWS) -> Iterator[bytes]:
    """Yield lists of what is made of rows as pickle has them, the same whatever their size."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    sent = part.has_files_here and not stays_here()
    # Not the part itself: its reader may hold all rows.
    read = functools.partial(_read, part.open, part.images if sent else None, size)
    portions = ray.data.from_items([0]).map_batches(read, num_cpus=0, label_selector=here)
    stays: Any = {} if sent or not part.has_files_here else {"label_selector": here}
    portions = portions.map(functools.partial(_work, work, part.images), **stays)
    portions.context.execution_options.preserve_order = True
    # A block is one portion, however small, so that all CPUs have work.
    portions.context.target_max_block_size = 1
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
    """Yield a source's rows in portions.

    images: the folder of pictures that travel with them.
    """
    read = image_reader(images)
    portion: list[Row | Rejection] = []
    size = 0
    for row in in_order(lambda row: fetched(row, read), rows()) if images else rows():
        portion.append(row)
        if isinstance(portion[-1], Row):
            size += sum(map(len, portion[-1].sample.pictures))
        if len(portion) == most_rows or size >= _PORTION_BYTES:
            yield {"rows": [pickle.dumps(portion)]}
            portion, size = [], 0
    if portion:
        yield {"rows": [pickle.dumps(portion)]}


def _work(work: Work, images: str | None, portion: dict[str, Any]) -> dict[str, Any]:
    """Read what is not read yet of a portion's pictures, and do the work."""
    rows, read = pickle.loads(portion["rows"]), image_reader(images)
    if images is not None and not Storage(images).is_local:
        # Threads wait for the storage; decoding has the one CPU of a task.
        rows = in_order(lambda row: fetched(row, read), rows)
    return {"rows": pickle.dumps([work(row, read) for row in rows])}


def stays_here() -> bool:
    """Say whether tasks are kept on this node: it is the only one, and has CPUs, as a head whose
    workers are still to come may have none."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = [node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]]
    return len(cpus) == 1 and cpus[0] >= 1
