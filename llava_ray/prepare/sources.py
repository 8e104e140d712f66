"""Open what data.source names: a file by its reader, or a data set of the Hugging Face hub."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.readers import readers
from llava_ray.prepare.table import BATCH_ROWS, BrokenRow, Cells, Table, binary_columns, decoded

SCENE_TEXT = "scene-text"
_PICTURES = {
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"
}  # fmt: skip


def open_table(config: DataConfig) -> Table:
    """Open a local file or folder, or a Hugging Face id.

    Raises DataError where there is no such source, ConfigError for another kind of file.
    """
    path = Path(config.source).expanduser()
    if path.exists():
        return open_folder(path, config) if path.is_dir() else open_file(path)
    check_source(config.source)
    if path.suffix in readers() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        raise DataError(f"data.source {config.source!r}: no such file (looked in {Path.cwd()})")
    return open_hub(config.source, config.split)


def here_or_copied(source: str, scratch: Path) -> str:
    """Copy a remote file or folder here, a folder with its pictures; return where it is then."""
    if "://" not in source:
        return source
    storage = Storage(source, setting="data.source")
    if storage.is_local:
        return storage.root
    names = storage.all_files()
    if not names:
        raise DataError(f"data.source {source!r}: no such file or folder")
    if names == [""]:
        parent, _, name = source.rpartition("/")
        Storage(parent, setting="data.source").get_files("", [name], scratch)
        return str(scratch / name)
    storage.get_files("", names, scratch)
    return str(scratch)


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
    except DataError as error:
        said = str(error)
        raise DataError(
            said if said.startswith("data.source") else f"data.source {str(path)!r}: {said}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.source {str(path)!r}: cannot be read ({error})") from error


def _suffixes() -> str:
    return ", ".join(readers())


def open_folder(folder: Path, config: DataConfig) -> Table:
    """Open a folder: save_to_disk's, an imagefolder, files that a reader knows, or pictures with
    a .txt beside each.

    Raises ConfigError where it is none of these.
    """
    if (folder / "dataset_dict.json").is_file() and not (folder / config.split).is_dir():
        there = ", ".join(sorted(p.parent.name for p in folder.glob("*/state.json")))
        raise ConfigError(f"data.split {config.split!r}: {str(folder)!r} has {there or 'none'}")
    for place in (folder, folder / config.split):
        if (place / "state.json").is_file():
            return _open_saved(place)
        metadata = [path for path in sorted(place.glob("metadata.*")) if path.suffix in readers()]
        if metadata:
            return open_file(metadata[0])
    kinds: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] not in "._"):
        kinds.setdefault(path.suffix.lower(), []).append(path)
    known = {suffix: paths for suffix, paths in kinds.items() if suffix in readers()}
    if len(known) == 1:
        ((_, paths),) = known.items()
        of_split = [path for path in paths if config.split in path.stem]
        return _joined([open_file(path) for path in of_split or paths], folder)
    if known:
        examples = ", ".join(str(paths[0].relative_to(folder)) for paths in known.values())
        raise ConfigError(
            f"data.source {str(folder)!r} holds several kinds of data: name one of {examples}"
        )
    if ".txt" in kinds and kinds.keys() & _PICTURES:
        return _open_captions(folder, kinds)
    raise ConfigError(
        f"data.source {str(folder)!r}: no {_suffixes()} in it, no save_to_disk and no pictures "
        "with a .txt caption of the same name"
    )


def _open_saved(folder: Path) -> Table:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError,
        datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"data.source {str(folder)!r}: a damaged data set ({reason})") from error
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.arrow")):
        digest.update(sha256_of(path).encode())
    return _of_dataset(dataset, digest.hexdigest())


def _joined(tables: Sequence[Table], folder: Path) -> Table:
    """Return the rows of several files one after the other."""

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for table in tables:
            yield from table.read([name for name in columns if name in table.columns])

    return Table(
        columns=tuple(dict.fromkeys(name for table in tables for name in table.columns)),
        num_rows=sum(table.num_rows for table in tables),
        sha256=hashlib.sha256(" ".join(table.sha256 for table in tables).encode()).hexdigest(),
        read=read,
        folder=folder if len(tables) > 1 else tables[0].folder,
        binary_columns=frozenset().union(*(table.binary_columns for table in tables)),
    )


def _open_captions(folder: Path, kinds: Mapping[str, Sequence[Path]]) -> Table:
    pictures = sorted(path for suffix in _PICTURES for path in kinds.get(suffix, ()))

    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for path in pictures:
            name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
            if not text.is_file():
                text = path.with_suffix(".TXT")
            try:
                caption = decoded(text.read_bytes()) if text.is_file() else ""
            except DataError as error:
                yield BrokenRow(f"{text.name}: {error}")
                continue
            yield {"file_name": name, "text": caption}

    digest = hashlib.sha256()
    for path in kinds[".txt"]:
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return Table(("file_name", "text"), len(pictures), digest.hexdigest(), read, folder)


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
    content = f"{name} {split} {builder.config.name} {builder.hash} {dataset.num_rows}"
    return _of_dataset(dataset, hashlib.sha256(content.encode()).hexdigest())


def _of_dataset(dataset: Any, sha256: str) -> Table:
    import datasets

    arrow = dataset.with_format("arrow")

    def read(columns: Sequence[str]) -> Iterator[Cells]:
        chosen = arrow.select_columns(list(columns))
        for batch in chosen.iter(BATCH_ROWS):
            # An image may be a path into the download cache; this reads it in.
            yield from datasets.table.embed_table_storage(batch).to_pylist()

    return Table(
        columns=tuple(dataset.column_names),
        num_rows=dataset.num_rows,
        sha256=sha256,
        read=read,
        folder=None,
        binary_columns=binary_columns(dataset.features.arrow_schema),
    )
