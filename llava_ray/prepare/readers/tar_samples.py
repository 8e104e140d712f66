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
from llava_ray.prepare.table import PICTURES, BrokenRow, Cells, Table, decoded

_TEXT = ("txt", "caption", "text", "cls")
"""Of several the first is the caption."""


def _open_tar(path: Path) -> Table:
    columns: dict[str, None] = {"__key__": None, "image": None}
    count = 0
    try:
        for cells in _samples(path, with_images=False):
            count += 1
            if isinstance(cells, dict):
                columns |= dict.fromkeys(cells)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(
            f"data.source {str(path)!r}: no whole tar ({str(error).splitlines()[0]})"
        ) from error

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return _samples(path, with_images=True)

    binary = frozenset({"image"})
    return Table(tuple(columns), count, sha256_of(path), read, path.parent, binary)


def _samples(path: Path, *, with_images: bool) -> Iterator[Cells | BrokenRow]:
    key, parts = "", dict[str, bytes]()
    seen: dict[str, set[str]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not member.isfile() or not stem or not suffix:
                continue
            suffix = suffix.lower()
            if parts and (f"{folder}/{stem}" != key or suffix in parts):
                yield from _rows_of(key, parts)
                seen.setdefault(key, set()).update(parts)
                parts = {}
            key = f"{folder}/{stem}"
            if not parts and key in seen and suffix not in seen[key]:
                raise DataError(
                    f"{member.name} comes after other samples than {sorted(seen[key])[0]} of the "
                    "same name: files of a sample lie side by side (tar --sort=name)"
                )
            stream = tar.extractfile(member) if with_images or not _is_image(suffix) else None
            parts[suffix] = stream.read() if stream else b""
        # tarfile itself takes a damaged header, and a file that was cut, for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"it is damaged at byte {tar.offset}")
    if parts:
        yield from _rows_of(key, parts)


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in PICTURES


def _rows_of(key: str, parts: dict[str, bytes]) -> Iterator[Cells | BrokenRow]:
    """Yield the sample of a name, or several where dots in names made them one."""
    stems: dict[str, dict[str, bytes]] = {}
    for suffix, content in parts.items():
        stem, dot, last = suffix.rpartition(".")
        stems.setdefault(stem + dot, {})[last] = content
    captions = [stem for stem, files in stems.items() if files.keys() & {*_TEXT, "json"}]
    if len(captions) < 2:
        yield _cells(key, parts)
        return
    for stem, files in stems.items():
        yield _cells(f"{key}.{stem.rstrip('.')}", files)


def _cells(key: str, parts: dict[str, bytes]) -> Cells | BrokenRow:
    name = key.lstrip("/")
    cells: Cells = {"__key__": name}
    named: list[Any] = []
    if "json" in parts:
        try:
            tree = json.loads(parts["json"])
        except (ValueError, RecursionError) as error:
            return BrokenRow(f"{name}.json is not JSON ({error})")
        if isinstance(tree, dict):
            # The pictures are in the tar; what they are called says their order.
            image = tree.pop("image", None)
            named, cells = image if isinstance(image, list) else [], cells | tree
    texts = [suffix for kind in _TEXT for suffix in parts if suffix.rpartition(".")[2] == kind]
    if texts:
        try:
            cells["txt"] = decoded(parts[texts[0]])
        except DataError as error:
            return BrokenRow(f"{name}.{texts[0]}: {error}")
    images = [suffix for suffix in parts if _is_image(suffix)]
    plain = [suffix for suffix in images if "." not in suffix]
    base = name.rpartition("/")[2]
    listed = [str(each).rpartition("/")[2].removeprefix(f"{base}.").lower() for each in named]
    if listed and set(listed) <= set(images):
        chosen = listed
    else:
        # Beside a sample's picture lie masks and the like; without one, its pictures by name.
        chosen = plain or sorted(images, key=_natural)
    return cells | {"image": [parts[suffix] for suffix in chosen]}


def _natural(suffix: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in suffix.split(".")]


READER = Reader(".tar", "webdataset: `0001.jpg` beside `0001.txt` or `0001.json`", _open_tar)
