"""Parquet."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_ray.artifacts.store import sha256_of
from llava_ray.errors import DataError
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import BATCH_ROWS, BrokenRow, Cells, Table, binary_columns, each_row


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
                        yield from each_row(batch)
                        left -= batch.num_rows
                except (pyarrow.ArrowException, OSError) as error:
                    reason = str(error).splitlines()[0]
                    yield from [BrokenRow(f"a damaged page ({reason})")] * left

    with file:
        return Table(
            columns=tuple(file.schema_arrow.names),
            num_rows=file.metadata.num_rows,
            sha256=sha256_of(path),
            read=read,
            folder=path.parent,
            binary_columns=binary_columns(file.schema_arrow),
        )


READER = Reader(".parquet", "a table with images, or their file names, and captions", _open_parquet)
