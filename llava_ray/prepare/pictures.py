"""Read and check images in parallel, and copy the good ones; hash those apart from the table."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llava_ray.artifacts.storage import Storage
from llava_ray.console import Progress
from llava_ray.errors import DataError
from llava_ray.models.rgb import open_image
from llava_ray.prepare.dialogue import RowProblem
from llava_ray.prepare.rows import Rejection, Row

A = TypeVar("A")
B = TypeVar("B")

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp"}

Read = Callable[[str], bytes]
"""From an image's path in a row to its file. Raises RowProblem where there is none."""


def image_reader(folder: str | None) -> Read:
    """Return what reads images below a path or an fsspec URI; None: rows must hold them."""
    if folder is None:

        def nowhere(name: str) -> bytes:
            raise RowProblem("missing_file", f"{name}: data.images names no folder")

        return nowhere
    storage = Storage(folder, setting="data.images")

    def read(name: str) -> bytes:
        try:
            # A folder or a pipe is no image file either.
            there = not storage.is_local or Path(storage.root, name).is_file()
            content = storage.read_bytes(name) if there else None
        except OSError as error:
            raise RowProblem("unusable_image", f"{name}: {error.strerror or error}") from error
        if content is None:
            raise RowProblem("missing_file", f"{name} is not in {storage.uri}: set data.images")
        return content

    return read


def store_images(
    rows: Iterable[Row | Rejection],
    read: Read,
    *,
    target: Path,
    folder: str,
    max_pixels: int,
    num_rows: int,
) -> Iterator[Row | Rejection]:
    """Decode every image once and copy the good ones below `target/folder`; the order is kept.

    A row then has its images' paths there. Decoding releases Python's lock, so threads are enough.
    """

    def check(row: Row | Rejection) -> Row | Rejection:
        if isinstance(row, Rejection):
            return row
        try:
            return _store(row, read, target, folder, max_pixels)
        except RowProblem as problem:
            return Rejection(row.number, row.id, problem.reason, problem.detail)

    progress = Progress("prepare", num_rows, "rows")
    for done, result in enumerate(_in_order(check, rows), 1):
        progress.at(done)
        yield result


def hash_images(rows: Iterable[Row | Rejection], read: Read) -> str:
    """Hash the files that rows name."""

    def digests(row: Row | Rejection) -> bytes:
        found = hashlib.sha256()
        for image in row.images if isinstance(row, Row) else ():
            if isinstance(image, str):
                try:
                    found.update(hashlib.sha256(image.encode() + b"\0" + read(image)).digest())
                except RowProblem as problem:
                    found.update(f"{image} {problem.reason}".encode())
        return found.digest()

    whole = hashlib.sha256()
    for part in _in_order(digests, rows):
        whole.update(part)
    return whole.hexdigest()


def _in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Work on items in threads; few wait at a time, so that image bytes do not pile up."""
    threads = min(16, os.cpu_count() or 1)
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _store(row: Row, read: Read, target: Path, folder: str, max_pixels: int) -> Row:
    names, contents = [], []
    for image in row.images:
        content, name = _content(image, read)
        try:
            open_image(content, max_pixels=max_pixels)
        except DataError as error:
            raise RowProblem("unusable_image", str(error)) from error
        name = f"{folder}{name}"
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names.append(name)
        contents.append(hashlib.sha256(content).hexdigest())
    return replace(row, images=tuple(names), contents=tuple(contents))


def _content(image: str | bytes, read: Read) -> tuple[bytes, str]:
    if isinstance(image, str):
        return read(image), image
    suffix = next((s for magic, s in _SUFFIXES.items() if image.startswith(magic)), ".webp")
    return image, hashlib.sha256(image).hexdigest()[:16] + suffix
