"""JSON lines."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import BrokenRow, Cells, Table, decoded, encoding_of


def open_jsonl(path: Path) -> Table:
    columns: dict[str, None] = {}
    num_rows = 0
    problem = ""
    for cells in _rows(path):
        num_rows += 1
        if isinstance(cells, dict):
            columns |= dict.fromkeys(cells)
        else:
            problem = problem or cells.detail
    if num_rows and not columns:
        from llava_ray.prepare.readers.llava_json import open_json

        try:
            return open_json(path)  # A list, or objects over several lines.
        except DataError:
            said = f"no line of it is a JSON object; its first is {problem}"
            raise DataError(f"data.source {str(path)!r}: {said}") from None

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return _rows(path)

    return Table(tuple(columns), num_rows, sha256_of(path), read, path.parent)


def _rows(path: Path) -> Iterator[Cells | BrokenRow]:
    with path.open("rb") as stream:
        plain = encoding_of(stream.read(4)) == "utf-8-sig"
        stream.seek(0)
        lines: Iterable[bytes] = stream
        if not plain:
            # By line ends alone: texts may hold what Unicode takes for one.
            text = decoded(stream.read())
            lines = (line.encode(errors="surrogatepass") for line in text.split("\n"))
        for number, line in enumerate(lines):
            row = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if row.strip():
                yield _cells(row)


def _cells(line: bytes) -> Cells | BrokenRow:
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"not JSON ({error})")
    if not isinstance(cells, dict):
        return BrokenRow(f"a JSON {type(cells).__name__}, not an object")
    return cells


READER = Reader(
    ".jsonl", "an object a line, with an image's file name and a caption", open_jsonl,
    also=(".ndjson",),
)  # fmt: skip
