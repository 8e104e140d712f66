"""What readers give: a table whose rows are read when needed.

Surprising: only columns that are asked for are read, so image bytes never pile up in memory.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import DataError

BATCH_ROWS = 64

Cells = dict[str, Any]


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


def decoded(content: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with a mark at its beginning.

    Raises DataError for anything else.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"neither UTF-8 nor UTF-16 text ({error.reason} at {error.start})"
        ) from error


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
