"""Webdataset: a tar of files, those of one sample with the same name but for the suffix."""

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import BrokenRow, Cells, Table, decoded

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
_TEXT = ("txt", "caption", "text", "cls")


def _open_tar(path: Path) -> Table:
    columns: dict[str, None] = {"__key__": None, "image": None}
    count = 0
    try:
        for cells in _samples(path, with_images=False):
            count += 1
            if isinstance(cells, dict):
                columns |= dict.fromkeys(cells)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"data.source {str(path)!r}: no whole tar ({error})") from error

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return _samples(path, with_images=True)

    binary = frozenset({"image"})
    return Table(tuple(columns), count, sha256_of(path), read, path.parent, binary)


def _samples(path: Path, *, with_images: bool) -> Iterator[Cells | BrokenRow]:
    key, parts = "", dict[str, Any]()
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not member.isfile() or not stem or not suffix:
                continue
            if parts and f"{folder}/{stem}" != key:
                yield _cells(key, parts)
                parts = {}
            key, suffix = f"{folder}/{stem}", suffix.lower()
            is_image = suffix.rpartition(".")[2] in _IMAGES
            stream = tar.extractfile(member) if with_images or not is_image else None
            parts[suffix] = stream.read() if stream else b""
        # tarfile itself takes a damaged header, and a file that was cut, for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"it is damaged at byte {tar.offset}")
    if parts:
        yield _cells(key, parts)


def _cells(key: str, parts: dict[str, bytes]) -> Cells | BrokenRow:
    cells: Cells = {"__key__": key.lstrip("/")}
    images = []
    for suffix, content in parts.items():
        if suffix.rpartition(".")[2] in _IMAGES:
            images.append(content)
        elif suffix == "json":
            try:
                tree = json.loads(content)
            except (ValueError, RecursionError) as error:
                return BrokenRow(f"{key.lstrip('/')}.json is not JSON ({error})")
            # The pictures are in the tar, whatever they were called before.
            cells |= (
                {k: v for k, v in tree.items() if k != "image"} if isinstance(tree, dict) else {}
            )
        elif suffix.rpartition(".")[2] in _TEXT:
            try:
                cells["txt"] = decoded(content)
            except DataError as error:
                return BrokenRow(f"{key.lstrip('/')}.{suffix}: {error}")
    return cells | {"image": images}


READER = Reader(".tar", "webdataset: `0001.jpg` beside `0001.txt` or `0001.json`", _open_tar)
