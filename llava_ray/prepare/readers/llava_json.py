"""JSON: LLaVA's and ShareGPT's lists of conversations, or any list of objects."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import BrokenRow, Cells, Table, decoded

_SPACE = re.compile(r"\s*")


def open_json(path: Path) -> Table:
    try:
        rows = _value(decoded(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source {str(path)!r}: not JSON ({error})") from error
    keys = ""
    if isinstance(rows, dict):
        lists = [each for each in rows.values() if isinstance(each, list)]
        keys = f" with the keys {', '.join(map(str, list(rows)[:5]))}"
        rows = _of_coco(rows) or (lists[0] if len(lists) == 1 else rows)
    if not isinstance(rows, list):
        raise DataError(
            f"data.source {str(path)!r}: holds a {type(rows).__name__}{keys}, not a list of rows "
            "such as objects with id, image and conversations: write that list to a file of its own"
        )
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for row in rows:
            good = isinstance(row, dict)
            yield row if good else BrokenRow(f"a {type(row).__name__}, not an object")

    return Table(tuple(columns), len(rows), sha256_of(path), read, path.parent)


def _value(text: str) -> Any:
    """Return what a file holds; of several values one after the other a list."""
    decoder, values = json.JSONDecoder(), []
    start = _next(text, 0)
    while start < len(text):
        value, end = decoder.raw_decode(text, start)
        values.append(value)
        start = _next(text, end)
    if not values:
        raise ValueError("it is empty")
    return values[0] if len(values) == 1 else values


def _next(text: str, start: int) -> int:
    """Return where white space ends."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _of_coco(tree: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return COCO's captions as rows, if it is that."""
    try:
        names = {image["id"]: image["file_name"] for image in tree["images"]}
        return [
            {"id": each["id"], "image": names[each["image_id"]], "caption": each["caption"]}
            for each in tree["annotations"]
        ]
    except (LookupError, TypeError):
        return None


READER = Reader(
    ".json",
    "LLaVA's list of `id`, `image` and `conversations`, or a list of any rows",
    open_json,
)
