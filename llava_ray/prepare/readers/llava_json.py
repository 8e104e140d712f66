"""JSON: LLaVA's and ShareGPT's lists of conversations, or any list of objects."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.readers.jsonl import open_jsonl
from llava_ray.prepare.table import BrokenRow, Cells, Table, decoded


def _open_json(path: Path) -> Table:
    try:
        rows = json.loads(decoded(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            return open_jsonl(path)
        raise DataError(f"data.source {str(path)!r}: not JSON ({error})") from error
    if isinstance(rows, dict):
        lists = [each for each in rows.values() if isinstance(each, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise DataError(
            f"data.source {str(path)!r}: holds a {type(rows).__name__}, not a list of rows "
            "such as objects with id, image and conversations"
        )
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for row in rows:
            good = isinstance(row, dict)
            yield row if good else BrokenRow(f"a {type(row).__name__}, not an object")

    return Table(tuple(columns), len(rows), sha256_of(path), read, path.parent)


READER = Reader(
    ".json",
    "LLaVA's list of `id`, `image` and `conversations`, or a list of any rows",
    _open_json,
)
