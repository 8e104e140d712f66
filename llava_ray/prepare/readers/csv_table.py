"""CSV, separated by what its lines say, with a line of names above."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import BrokenRow, Cells, Table, decoded

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def _open_csv(path: Path) -> Table:
    text = decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    first = text.partition("\n")[0]
    # Not the whole dialect, which csv.Sniffer guesses wrong where quotes are doubled late.
    delimiter = max(",;\t|", key=first.count)

    def lines() -> "Iterator[list[str]]":
        return csv.reader(io.StringIO(text), delimiter=delimiter)

    columns = next(lines(), [])
    if not any(columns):
        raise DataError(f"data.source {str(path)!r}: no line of column names")

    def rows() -> Iterator[Cells | BrokenRow]:
        for cells in islice(lines(), 1, None):
            if not cells:
                continue
            if len(cells) != len(columns):
                yield BrokenRow(f"{len(cells)} values for {len(columns)} columns")
            else:
                yield dict(zip(columns, cells, strict=True))

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return rows()

    return Table(tuple(columns), sum(1 for _ in rows()), sha256_of(path), read, path.parent)


READER = Reader(".csv", "a table with image file names and captions", _open_csv)
