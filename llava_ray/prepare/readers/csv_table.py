"""CSV, separated by what its lines say, with a line of names above."""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import PICTURES, BrokenRow, Cells, Table, decoded

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def _open_csv(path: Path) -> Table:
    text = decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    first, _, rest = text.partition("\n")
    if named := re.fullmatch("sep=(.)", first, re.IGNORECASE):  # As Excel writes it.
        text = rest
        first = rest.partition("\n")[0]
    # Not the whole dialect, which csv.Sniffer guesses wrong where quotes are doubled late.
    counted = re.sub('"[^"]*"', "", first)
    delimiter = named[1] if named else max(",;\t|", key=counted.count)

    def lines() -> "Iterator[list[str] | BrokenRow]":
        reader = csv.reader(
            io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        while True:
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BrokenRow(f"line {reader.line_num}: {error}")

    names = next(lines(), [])
    if isinstance(names, BrokenRow) or not any(names):
        raise DataError(f"data.source {str(path)!r}: no line of column names")
    columns = tuple(name.strip() for name in names)
    if twice := [name for name, count in Counter(columns).items() if count > 1 and name]:
        raise DataError(f"data.source {str(path)!r}: two columns are called {twice[0]!r}")

    def rows() -> Iterator[Cells | BrokenRow]:
        for cells in islice(lines(), 1, None):
            if isinstance(cells, BrokenRow):
                yield cells
            elif not cells:
                continue
            elif len(cells) != len(columns):
                yield BrokenRow(f"{len(cells)} values for {len(columns)} columns")
            elif any(_holds_rows(cell, delimiter, len(columns)) for cell in cells):
                yield BrokenRow("a value goes over lines that are rows: a quote is left open")
            else:
                yield dict(zip(columns, cells, strict=True))

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return rows()

    return Table(columns, sum(1 for _ in rows()), sha256_of(path), read, path.parent)


def _holds_rows(cell: str, delimiter: str, num_columns: int) -> bool:
    """Say whether a later line of a value has a row's columns, a picture's name among them."""
    return any(
        line.count(delimiter) == num_columns - 1
        and any(Path(part.strip().lower()).suffix in PICTURES for part in line.split(delimiter))
        for line in cell.split("\n")[1:]
    )


READER = Reader(".csv", "a table with image file names and captions", _open_csv, also=(".tsv",))
