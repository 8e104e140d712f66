"""Open what data.source names as a table whose rows are read when needed.

Surprising: only columns that are asked for are read, so image bytes never pile up in memory.
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SCENE_TEXT = "scene-text"
SUFFIXES = (".parquet", ".jsonl", ".json")
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


def open_table(config: DataConfig) -> Table:
    """Open a .parquet, .jsonl or .json file, or a Hugging Face id.

    Raises DataError where there is no such source, ConfigError for another kind of file.
    """
    path = Path(config.source).expanduser()
    if path.is_file():
        return open_file(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        raise ConfigError(
            f"data.source {config.source!r} is a folder: name the file in it"
            + (f", such as {inside[0]}" if inside else " (it has no .parquet, .jsonl or .json)")
        )
    if near := difflib.get_close_matches(config.source, [SCENE_TEXT], cutoff=0.7):
        raise ConfigError(f"data.source {config.source!r}: did you mean {near[0]!r}?")
    if "://" in config.source:
        raise ConfigError(f"data.source {config.source!r}: give a path on disk or a hub id")
    if path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        raise DataError(f"data.source {config.source!r}: no such file (looked in {Path.cwd()})")
    return open_hub(config.source, config.split)


def open_file(path: Path) -> Table:
    """Open a .parquet, .jsonl or LLaVA .json file."""
    openers = {".parquet": _open_parquet, ".jsonl": _open_jsonl, ".json": _open_json}
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise ConfigError(f"data.source {str(path)!r}: only {', '.join(SUFFIXES)} files are read")
    try:
        return opener(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.source {str(path)!r}: cannot be read ({error})") from error


def open_hub(name: str, split: str) -> Table:
    """Download a data set of the Hugging Face hub and open one split of it.

    Raises DataError where the hub refuses, ConfigError for an unknown split.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name)
        builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.source {name!r}: neither a file nor a hub id that can be loaded ({reason})"
        ) from error
    if split not in (builder.info.splits or {}):
        known = ", ".join(builder.info.splits or {})
        raise ConfigError(f"data.split {split!r}: {name} has {known}")
    dataset = builder.as_dataset(split=split)
    arrow = dataset.with_format("arrow")

    def read(columns: Sequence[str]) -> Iterator[Cells]:
        chosen = arrow.select_columns(list(columns))
        for batch in chosen.iter(BATCH_ROWS):
            # An image may be a path into the download cache; this reads it in.
            yield from datasets.table.embed_table_storage(batch).to_pylist()

    content = f"{name} {split} {builder.config.name} {builder.hash} {dataset.num_rows}"
    return Table(
        columns=tuple(dataset.column_names),
        num_rows=dataset.num_rows,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        read=read,
        folder=None,
        binary_columns=_binary_columns(dataset.features.arrow_schema),
    )


def _open_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.source {str(path)!r}: not parquet ({reason})") from error

    def read(columns: Sequence[str]) -> Iterator[Cells]:
        with parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(BATCH_ROWS, columns=list(columns)):
                yield from batch.to_pylist()

    with file:
        return Table(
            columns=tuple(file.schema_arrow.names),
            num_rows=file.metadata.num_rows,
            sha256=sha256_of(path),
            read=read,
            folder=path.parent,
            binary_columns=_binary_columns(file.schema_arrow),
        )


def _open_jsonl(path: Path) -> Table:
    columns: dict[str, None] = {}
    num_rows = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            num_rows += 1
            cells = _cells(line)
            if isinstance(cells, dict):
                columns |= dict.fromkeys(cells)
    if num_rows and not columns:
        raise DataError(f"data.source {str(path)!r}: no line of it is a JSON object")

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        with path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    yield _cells(line)

    return Table(tuple(columns), num_rows, sha256_of(path), read, path.parent)


def _cells(line: bytes) -> Cells | BrokenRow:
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"not JSON ({error})")
    if not isinstance(cells, dict):
        return BrokenRow(f"a JSON {type(cells).__name__}, not an object")
    return cells


def _open_json(path: Path) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source {str(path)!r}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(
            f"data.source {str(path)!r}: holds a {type(rows).__name__}, not a list of rows "
            "with id, image and conversations"
        )
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for row in rows:
            good = isinstance(row, dict)
            yield row if good else BrokenRow(f"a {type(row).__name__}, not an object")

    return Table(tuple(columns), len(rows), sha256_of(path), read, path.parent)


def _binary_columns(schema: Any) -> frozenset[str]:
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            return is_image(kind.value_type)
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return frozenset(field.name for field in schema if is_image(field.type))
