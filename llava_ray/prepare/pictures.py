"""Read, check and hash images in parallel."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import xxhash
from PIL import Image

from llava_ray.artifacts.storage import Storage
from llava_ray.errors import DataError
from llava_ray.models.conversation import Sample
from llava_ray.models.rgb import open_image
from llava_ray.prepare.dialogue import RowProblem, shorten
from llava_ray.prepare.rows import Rejection, Row

A = TypeVar("A")
B = TypeVar("B")

Read = Callable[[str], bytes]
"""From an image's path in a row to its file. Raises RowProblem where there is none."""


def image_reader(folder: str | None) -> Read:
    """Return what reads images below a path or an fsspec URI; None: rows must hold them."""
    storage = None if folder is None else Storage(folder, setting="data.images")
    on_web = folder is not None and folder.startswith(("http://", "https://"))

    def read(name: str) -> bytes:
        shown = shorten(name)
        if storage is None:
            raise RowProblem("missing_file", f"{shown}: data.images names no folder")
        try:
            # A folder or a pipe is no image file either.
            there = not storage.is_local or Path(storage.root, name).is_file()
            content = storage.read_bytes(quote(name) if on_web else name) if there else None
        except OSError as error:
            raise RowProblem("unusable_image", f"{shown}: {error.strerror or error}") from error
        if content is None:
            raise RowProblem("missing_file", f"{shown} is not in {storage.uri}: set data.images")
        return content

    return read


def fetched(row: Row | Rejection, read: Read) -> Row | Rejection:
    """Return a row with its pictures' files, or why they cannot be had."""
    if isinstance(row, Rejection):
        return row
    sample = row.sample
    named = zip(sample.images, sample.pictures, strict=True)
    try:
        files = tuple(file or read(name) for name, file in named)
    except RowProblem as problem:
        return Rejection(row.number, sample.id, problem.reason, problem.detail)
    return replace(row, sample=replace(sample, pictures=files))


@dataclass(frozen=True)
class Checked:
    """A good row's pictures."""

    contents: tuple[str, ...]
    """The SHA-256 of each file."""
    pixels: tuple[str, ...]
    """A hash of what each shows: the same picture may lie in files of several formats."""
    files: tuple[bytes, ...] = ()
    """Left out where the driver has them at hand."""


def checked(
    row: Row | Rejection, read: Read, *, max_pixels: int, with_files: bool
) -> Checked | Rejection:
    """Decode a row's pictures once, read first where that is not done."""
    row = fetched(row, read)
    if isinstance(row, Rejection):
        return row
    files = row.sample.pictures
    try:
        images = (open_image(file, max_pixels=max_pixels) for file in files)
        pixels = tuple(_pixel_digest(image) for image in images)
    except DataError as error:
        return Rejection(row.number, row.sample.id, "unusable_image", str(error))
    return Checked(content_digests(row.sample), pixels, files if with_files else ())


def joined(read: Read, pair: tuple[Row | Rejection, Checked | Rejection]) -> Row | Rejection:
    """Return a row with its pictures as they were checked, or why it is left out."""
    row, found = pair
    if isinstance(found, Rejection) or isinstance(row, Rejection):
        return found if isinstance(found, Rejection) else row
    if found.files:
        sample = replace(row.sample, pictures=found.files)
    else:
        again = fetched(row, read)
        if isinstance(again, Rejection):
            return again
        sample = again.sample
        if content_digests(sample) != found.contents:
            return Rejection(row.number, sample.id, "unusable_image", "changed while it was read")
    return replace(row, sample=sample, contents=found.contents, pixels=found.pixels)


def digest(row: Row | Rejection, read: Read) -> bytes:
    """Hash the files that a row names, or why they cannot be had."""
    row = fetched(row, read)
    found = row if isinstance(row, Rejection) else (row.sample.images, content_digests(row.sample))
    return hashlib.sha256(repr(found).encode()).digest()


def content_digests(sample: Sample) -> tuple[str, ...]:
    """Return the SHA-256 of each of its pictures' files."""
    return tuple(hashlib.sha256(file).hexdigest() for file in sample.pictures)


def _pixel_digest(image: Image.Image) -> str:
    # SHA-256 would take longer than decoding, as would new memory for all pixels at once.
    digest = xxhash.xxh3_128(repr(image.size).encode())
    for top in range(0, image.height, 64):
        strip = (0, top, image.width, min(top + 64, image.height))
        digest.update(image.crop(strip).tobytes())
    return digest.hexdigest()


def in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
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
