"""A small finished artifact, and functions that processes of their own run on it."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore, local_folder, read_record

FIELDS = {"device": "cpu", "source": "test", "num_train": 1, "num_test": 1, "rejected": {}}


def seal(store: ArtifactStore, files: Mapping[str, str], name: str = "dataset-1") -> DatasetRecord:
    """Make one of files by their paths."""
    with store.build(DatasetRecord, name, settings={"seed": 0}) as build:
        write(build.folder, files)
        return build.finish(DatasetRecord, **FIELDS)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files by their paths."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def open_at_once(uri: str, tasks: int) -> list[str]:
    """Ask for an artifact from several threads at a time; return what each read of it."""

    def task(_: int) -> str:
        folder = local_folder(read_record(DatasetRecord, uri))
        return (folder / "images" / "a.txt").read_text(encoding="utf-8")

    with ThreadPoolExecutor(tasks) as pool:
        return list(pool.map(task, range(tasks)))
