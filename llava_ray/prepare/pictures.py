"""Check images in parallel and copy the good ones; hash those that lie apart from the table."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from llava_ray.console import Progress
from llava_ray.errors import DataError
from llava_ray.models.rgb import open_image
from llava_ray.prepare.rows import Rejection, Row, RowProblem

HASHED_BYTES = 64 * 1024
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp"}


def store_images(
    rows: Iterable[Row | Rejection],
    *,
    source: Path | None,
    target: Path,
    max_pixels: int,
    num_rows: int,
) -> Iterator[Row | Rejection]:
    """Decode every image once and copy the good ones below `target`; the order is kept.

    A row then has its image's path there. Decoding releases Python's lock, so threads are enough.
    """

    def check(row: Row | Rejection) -> Row | Rejection:
        if isinstance(row, Rejection):
            return row
        try:
            return _store(row, source, target, max_pixels)
        except RowProblem as problem:
            return Rejection(row.number, row.id, problem.reason, problem.detail)

    def checked() -> Iterator[Row | Rejection]:
        waiting: deque[Future[Row | Rejection]] = deque()
        for row in rows:
            waiting.append(pool.submit(check, row))
            # Bounded, so that image bytes of a large table do not pile up.
            if len(waiting) >= 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    threads = min(16, os.cpu_count() or 1)
    progress = Progress("prepare", num_rows, "rows")
    with ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(checked(), 1):
            progress.at(done)
            yield result


def hash_image_files(rows: Iterable[Row | Rejection], source: Path) -> str:
    """Hash names, sizes, first and last 64 KiB of the files that rows name.

    Whole files are not read: that would take as long as the stage itself.
    """
    names = [row.image for row in rows if isinstance(row, Row) and isinstance(row.image, str)]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for part in pool.map(lambda name: _ends_of_file(source / name), names):
            digest.update(part)
    return digest.hexdigest()


def _ends_of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            digest = hashlib.sha256(f"{path.name} {size} ".encode())
            digest.update(stream.read(HASHED_BYTES))
            stream.seek(max(0, size - HASHED_BYTES))
            digest.update(stream.read(HASHED_BYTES))
    except OSError as error:
        return f"{path.name} {type(error).__name__}".encode()
    return digest.digest()


def _store(row: Row, source: Path | None, target: Path, max_pixels: int) -> Row:
    content, name = _content(row.image, source)
    try:
        open_image(content, max_pixels=max_pixels)
    except DataError as error:
        raise RowProblem("unusable_image", str(error)) from error
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return replace(row, image=name)


def _content(image: str | bytes, source: Path | None) -> tuple[bytes, str]:
    if isinstance(image, bytes):
        suffix = next((s for magic, s in _SUFFIXES.items() if image.startswith(magic)), ".webp")
        return image, hashlib.sha256(image).hexdigest()[:16] + suffix
    if source is None:
        raise RowProblem("missing_file", f"{image}: data.images names no folder")
    path = source / image
    try:
        # A folder or a pipe is no image file either.
        if not path.is_file():
            raise RowProblem("missing_file", image)
        return path.read_bytes(), image
    except OSError as error:
        raise RowProblem("unusable_image", f"{image}: {error.strerror}") from error
