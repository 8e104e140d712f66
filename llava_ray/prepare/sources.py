"""Open what data.source names: a file by its reader, or a data set of the Hugging Face hub."""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.readers import readers
from llava_ray.prepare.table import (
    BATCH_ROWS,
    FOLDER,
    PICTURES,
    BrokenRow,
    Cells,
    Table,
    binary_columns,
    class_names,
    decoded,
    each_row,
    names_files,
    with_names,
)

logger = logging.getLogger(__name__)

SCENE_TEXT = "scene-text"
_NOTES = ("dataset_infos.json", "dataset_info.json")
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Words in files' names, as the datasets library reads them."""


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
        place, name = place_and_name(source)
        Storage(place, setting="data.source").get_files("", [name], scratch)
        return str(scratch / name)
    storage.get_files("", names, scratch)
    return str(scratch)


def place_and_name(uri: str) -> tuple[str, str]:
    """Return the folder of a remote file, and its name there.

    A chain such as zip://rows.csv::s3://bucket/x.zip names the file before its archive.
    """
    first, *chain = uri.split("::")
    parent, slash, name = first.rpartition("/")
    return "::".join([parent + slash, *chain]), name


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
        if len(metadata) == 1:
            return open_file(metadata[0])
    kinds: dict[str, list[Path]] = {}
    for path in sorted(_files_below(folder)):
        kinds.setdefault(path.suffix.lower(), []).append(path)
    known = {suffix: paths for suffix, paths in kinds.items() if suffix in readers()}
    pictures = [path for suffix in PICTURES for path in kinds.get(suffix, ())]
    texts = {path.with_suffix("") for path in kinds.get(".txt", ())}
    captioned = any(path.with_suffix("") in texts for path in pictures)
    known = _without_statistics(known, pictures if captioned else ())
    if len(known) + captioned > 1:
        examples = ", ".join(str(paths[0].relative_to(folder)) for paths in known.values())
        besides = " beside pictures with a .txt of the same name" if captioned else ""
        raise ConfigError(
            f"data.source {str(folder)!r} holds several kinds of data: name one of "
            f"{examples}{besides}, or move the others away"
        )
    if captioned:
        _warn_of_unused(texts - {path.with_suffix("") for path in pictures}, folder)
        chosen = _of_split(sorted(pictures), folder, config.split, by_name=False)
        return _open_captions(folder, chosen, kinds[".txt"])
    if known:
        ((_, paths),) = known.items()
        chosen = _of_split(paths, folder, config.split)
        return _joined(chosen, folder)
    raise ConfigError(
        f"data.source {str(folder)!r}: no {_suffixes()} in it, no save_to_disk and no pictures "
        "with a .txt caption of the same name"
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield files that are not hidden, in folders behind links too, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(
            name for name in folders if name[0] != "." and not name.startswith("__")
        )  # fmt: skip
        if real not in seen:
            paths = (Path(place, name) for name in names if name[0] not in "._")
            yield from (path for path in paths if os.path.isfile(path))
        seen.add(real)


def _without_statistics(
    known: dict[str, list[Path]], captioned: Sequence[Path]
) -> dict[str, list[Path]]:
    """Leave out what says the same of others: what img2dataset writes beside each tar, picture or
    folder of the same name, and the hub's own notes."""
    others = {path.with_suffix("") for path in known.get(".tar", ())}
    others |= {path.with_suffix("") for path in captioned} | {path.parent for path in captioned}

    def is_data(path: Path) -> bool:
        stem = path.with_suffix("")
        about = stem.with_name(stem.name.removesuffix("_stats"))
        return path.suffix == ".tar" or (about not in others and path.name not in _NOTES)

    named = {suffix: [path for path in paths if is_data(path)] for suffix, paths in known.items()}
    return {suffix: paths for suffix, paths in named.items() if paths}


def _warn_of_unused(stems: Set[Path], folder: Path) -> None:
    if stems:
        first = min(str(stem.relative_to(folder)) for stem in stems)
        logger.warning(
            "prepare: %d .txt files have no picture beside them that is read, first %r; "
            "pictures end in %s", len(stems), first, ", ".join(sorted(PICTURES)),
        )  # fmt: skip


def _of_split(
    paths: Sequence[Path], folder: Path, split: str, *, by_name: bool = True
) -> Sequence[Path]:
    """Return the files of a split by the words of their names and folders, or of these alone; those
    that name none are train's.

    Raises ConfigError where there are none.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        relative = path.relative_to(folder)
        text = str(relative.with_suffix("") if by_name else relative.parent).lower()
        # Digits part words too: train2017.
        words = {*re.split("[^a-z0-9]+", text), *re.split("[^a-z]+", text)}
        named = [name for name, known in _SPLITS.items() if known & words]
        own = split if split.lower() in words else next(iter(named), "train")
        found.setdefault(own, []).append(path)
    if split not in found:
        raise ConfigError(f"data.split {split!r}: {str(folder)!r} has {', '.join(sorted(found))}")
    left_out = len(paths) - len(found[split])
    if left_out:
        logger.info("prepare: %d of %d files are of other splits", left_out, len(paths))
    return found[split]


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


def _joined(paths: Sequence[Path], folder: Path) -> Table:
    """Return the rows of several files one after the other."""
    tables = [open_file(path) for path in paths]
    if odd := [
        p for p, t in zip(paths, tables, strict=True) if {*t.columns} != {*tables[0].columns}
    ]:
        logger.warning(
            "prepare: %d files are read as one, and %s has other columns than %s: data.source "
            "names one alone, data.mix several", len(paths), odd[0].name, paths[0].name,
        )  # fmt: skip

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for table in tables:
            below = table.folder and table.folder != folder and table.folder.relative_to(folder)
            for cells in table.read([name for name in columns if name in table.columns]):
                yield {**cells, FOLDER: str(below)} if below and isinstance(cells, dict) else cells

    return Table(
        columns=tuple(dict.fromkeys(name for table in tables for name in table.columns)),
        num_rows=sum(table.num_rows for table in tables),
        sha256=hashlib.sha256(" ".join(table.sha256 for table in tables).encode()).hexdigest(),
        read=read,
        folder=folder if len(tables) > 1 else tables[0].folder,
        binary_columns=frozenset().union(*(table.binary_columns for table in tables)),
        names_files=any(table.names_files for table in tables),
    )


def _open_captions(folder: Path, pictures: Sequence[Path], texts: Sequence[Path]) -> Table:
    def read(_: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        for path in pictures:
            name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
            if not text.is_file():
                text = path.with_suffix(".TXT")
            if not text.is_file():
                yield BrokenRow(f"{name} has no .txt of the same name")
                continue
            try:
                caption = decoded(text.read_bytes())
            except DataError as error:
                yield BrokenRow(f"{text.name}: {error}")
                continue
            yield {"file_name": name, "text": caption}

    digest = hashlib.sha256()
    for path in texts:
        name = os.fsencode(path.relative_to(folder))
        digest.update(name + f" {sha256_of(path)}\n".encode())
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

    arrow, kinds = dataset.with_format("arrow"), dataset.features
    binary, labels = binary_columns(kinds.arrow_schema), class_names(kinds.arrow_schema)

    def read(columns: Sequence[str]) -> Iterator[Cells | BrokenRow]:
        chosen = arrow.select_columns(list(columns))
        for start in range(0, dataset.num_rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, dataset.num_rows)
            rows = each_row(chosen[start:stop], datasets.table.embed_table_storage)
            yield from with_names(rows, labels)

    return Table(
        columns=tuple(dataset.column_names),
        num_rows=dataset.num_rows,
        sha256=sha256,
        read=read,
        folder=None,
        binary_columns=binary,
        names_files=names_files([dataset.data.column(name) for name in binary]),
    )
