"""CSV, separated by what its lines say, with a line of names above."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

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

    written = text.removesuffix("\n").split("\n")

    most = 1 if _is_strict(written, delimiter) else 0

    def lines() -> "Iterator[list[str] | BrokenRow]":
        start = 0
        while start < len(written):
            reader = _reader(written, start, delimiter)
            begun = start
            try:
                for cells in reader:
                    if any(_holds_rows(cell, delimiter, most) for cell in cells):
                        raise csv.Error("a value goes over lines that are rows")
                    start = begun + reader.line_num
                    yield cells
            except csv.Error as error:
                # What a quote that is left open has swallowed are rows of their own.
                yield BrokenRow(f"line {start + 1}: a quote is left open or misplaced ({error})")
                start += 1
            else:
                return

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
            else:
                yield dict(zip(columns, cells, strict=True))

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        return rows()

    return Table(columns, sum(1 for _ in rows()), sha256_of(path), read, path.parent)


def _reader(written: Sequence[str], start: int, delimiter: str) -> Any:
    lines = (f"{written[number]}\n" for number in range(start, len(written)))
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)


def _is_strict(written: Sequence[str], delimiter: str) -> bool:
    """Say whether all quotes of a file stand where RFC 4180 has them."""
    try:
        return all(True for _ in _reader(written, 0, delimiter))
    except csv.Error:
        return False


def _holds_rows(cell: str, delimiter: str, most: int) -> bool:
    """Say whether all later lines of a value begin or end as rows do, with a picture's name; so
    many of them a text may have."""
    later = cell.split("\n")[1:]
    return len(later) > most and all(
        any(Path(part.strip().lower()).suffix in PICTURES for part in line.split(delimiter))
        and delimiter in line
        for line in later
    )


READER = Reader(".csv", "a table with image file names and captions", _open_csv, also=(".tsv",))
