"""What readers give: a table whose rows are read when needed.

Surprising: only columns that are asked for are read, so image bytes never pile up in memory.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import DataError

BATCH_ROWS = 64

Cells = dict[str, Any]
FOLDER = "__folder__"
"""Among a row's cells: where its own file lies below the table's folder."""
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
PICTURES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
        ".avif", ".heic", ".heif",
    }
)  # fmt: skip
"""Ends of their files' names."""


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read at all."""

    detail: str


@dataclass(frozen=True)
class Table:
    """Rows of a source, by column."""

    columns: tuple[str, ...]
    num_rows: int
    sha256: str
    """The digest of the rows' content; image files lying apart are not part of it."""
    read: Callable[[Sequence[str]], Iterator[Cells | BrokenRow]]
    """Yield all rows in order, with the given columns only."""
    folder: Path | None
    """Where image paths start unless data.images says otherwise."""
    binary_columns: frozenset[str] = frozenset()
    """Columns that hold images themselves, as bytes or as datasets' {bytes, path}."""
    names_files: bool = False
    """Whether some cells of these columns name files that lie apart."""


def decoded(content: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 by its mark or by the zeros of its first letters.

    Bytes of a UTF-8 file that are no text become lone surrogates, for which `RowReader` rejects the
    row alone. Raises DataError for UTF-16 that ends within a letter.
    """
    encoding = encoding_of(content)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise DataError(f"no {encoding} text ({error.reason} at {error.start})") from error


def encoding_of(content: bytes) -> str:
    """Tell UTF-8 from UTF-16 and UTF-32 by the first bytes of a file."""
    for encoding, marks in _MARKS.items():
        if content.startswith(marks):
            return encoding
    if len(content) < 2 or (content[0] == 0) == (content[1] == 0):
        return "utf-8-sig"
    return "utf-16-le" if content[1] == 0 else "utf-16-be"


def class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of a column's labels, where the datasets library wrote them down."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {n: kind["names"] for n, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def with_names(rows: Iterator[Any], names: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """Yield rows with labels' names in place of their numbers."""
    for row in rows:
        if isinstance(row, dict):
            for column in names.keys() & row.keys():
                label = row[column]
                if isinstance(label, int) and 0 <= label < len(names[column]):
                    row[column] = names[column][label]
        yield row


def names_files(columns: Sequence[Any]) -> bool:
    """Say whether a chunked Arrow column of {bytes, path} has rows without bytes."""
    import pyarrow.types as types

    return any(
        types.is_struct(column.type)
        and column.type.get_field_index("bytes") >= 0
        and any(chunk.field("bytes").null_count for chunk in column.chunks)
        for column in columns
    )


def each_row(batch: Any, opened: Callable[[Any], Any] = lambda batch: batch) -> Iterator[Any]:
    """Yield the rows of an Arrow batch or table as they are opened; a broken one costs no other."""
    import pyarrow

    try:
        rows = opened(batch).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if batch.num_rows == 1:
            yield BrokenRow(f"it is damaged ({' '.join(str(error).split())[:200]})")
            return
        for number in range(batch.num_rows):
            yield from each_row(batch.slice(number, 1), opened)
    else:
        yield from rows


def binary_columns(schema: Any) -> frozenset[str]:
    """Return the columns of an Arrow schema that hold images themselves."""
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            return is_image(kind.value_type)
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return frozenset(field.name for field in schema if is_image(field.type))
