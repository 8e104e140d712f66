"""Open what data.source names: a file by its reader, or a data set of the Hugging Face hub."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.readers import readers
from llava_ray.prepare.table import BATCH_ROWS, Cells, Table, binary_columns

SCENE_TEXT = "scene-text"


def open_table(config: DataConfig) -> Table:
    """Open a file that a reader knows by its suffix, or a Hugging Face id.

    Raises DataError where there is no such source, ConfigError for another kind of file.
    """
    path = Path(config.source).expanduser()
    if path.is_file():
        return open_file(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in readers())
        raise ConfigError(
            f"data.source {config.source!r} is a folder: name the file in it"
            + (f", such as {inside[0]}" if inside else f" (it has no {_suffixes()})")
        )
    check_source(config.source)
    if "://" in config.source:
        raise ConfigError(f"data.source {config.source!r}: give a path on disk or a hub id")
    if path.suffix in readers() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        raise DataError(f"data.source {config.source!r}: no such file (looked in {Path.cwd()})")
    return open_hub(config.source, config.split)


def check_source(source: str) -> None:
    """Raise ConfigError for a name that is nearly, but not quite, the generated data's."""
    near = difflib.get_close_matches(source, [SCENE_TEXT], cutoff=0.7)
    if near and source != SCENE_TEXT and not Path(source).exists():
        raise ConfigError(f"data.source {source!r}: did you mean {near[0]!r}?")


def open_file(path: Path) -> Table:
    """Open a file by the reader of its suffix.

    Raises ConfigError where none knows it, DataError where it cannot be read.
    """
    reader = readers().get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"data.source {str(path)!r}: only {_suffixes()} files are read")
    try:
        return reader.open(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.source {str(path)!r}: cannot be read ({error})") from error


def _suffixes() -> str:
    return ", ".join(readers())


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
        binary_columns=binary_columns(dataset.features.arrow_schema),
    )
