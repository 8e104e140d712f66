"""Parquet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import (
    BATCH_ROWS,
    BrokenRow,
    Cells,
    Table,
    binary_columns,
    class_names,
    each_row,
    with_names,
)


def _open_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.source {str(path)!r}: not parquet ({reason})") from error

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        with parquet.ParquetFile(path) as opened:
            for group in range(opened.num_row_groups):
                left = opened.metadata.row_group(group).num_rows
                batches = opened.iter_batches(BATCH_ROWS, columns=list(columns), row_groups=[group])
                try:
                    for batch in batches:
                        yield from with_names(each_row(batch), labels)
                        left -= batch.num_rows
                except (pyarrow.ArrowException, OSError) as error:
                    reason = str(error).splitlines()[0]
                    yield from [BrokenRow(f"a damaged page ({reason})")] * left

    binary, labels = binary_columns(file.schema_arrow), class_names(file.schema_arrow)
    with file:
        return Table(
            columns=tuple(file.schema_arrow.names),
            num_rows=file.metadata.num_rows,
            sha256=sha256_of(path),
            read=read,
            folder=path.parent,
            binary_columns=binary,
            names_files=any(_lacks_bytes(file.metadata, name) for name in binary),
        )


def _lacks_bytes(metadata: Any, column: str) -> bool:
    """Say whether a {bytes, path} column has rows without bytes, or does not tell."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            if part.path_in_schema in (f"{column}.bytes", f"{column}.list.element.bytes"):
                counted = part.is_stats_set and part.statistics.has_null_count
                if not counted or part.statistics.null_count:
                    return True
    return False


READER = Reader(".parquet", "a table with images, or their file names, and captions", _open_parquet)
