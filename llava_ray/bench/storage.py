"""Small files up and down as artifacts move, beside one at a time, on a server that delays.

Surprising: one at a time takes too long for all files, so it is measured on a share of them and
told per file.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from timeit import timeit
from typing import Any

from llava_ray.artifacts.storage import Storage
from llava_ray.bench import results

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_TEXT = "x" * 2048
"""Of each file."""


def run(out: Path, uri: str, *, files: int, one_by_one: int, delay_s: float) -> Path:
    """Time both ways below `uri` and write a row for each direction.

    files: how many are moved at once; one_by_one: how many singly; delay_s: what the server waits
    before each answer, for the record.
    """
    rows: list[dict[str, Any]] = []
    names = [f"{index:06d}" for index in range(files)]
    with tempfile.TemporaryDirectory() as folder:
        many, back = Path(folder) / "many", Path(folder) / "back"
        many.mkdir()
        for name in (*names, _MANIFEST):
            (many / name).write_text(_TEXT, encoding="utf-8")
        storage, single = Storage(uri), Storage(uri)
        storage.read_text("warm-up")
        bulk_s = timeit(lambda: storage.put_folder(many, "many", last=_MANIFEST), number=1)
        single_s = timeit(lambda: _put(single, names[:one_by_one]), number=1)
        rows.append(_row("up", bulk_s / files, single_s / one_by_one))
        bulk_s = timeit(lambda: storage.get_files("many", names, back), number=1)
        assert len(list(back.iterdir())) == files
        single_s = timeit(lambda: _get(single, names[:one_by_one], back), number=1)
        rows.append(_row("down", bulk_s / files, single_s / one_by_one))
    tree = {
        "files": files, "one_by_one": one_by_one, "file_bytes": len(_TEXT), "delay_s": delay_s,
        "rows": rows,
    }  # fmt: skip
    return results.write(out, "storage", tree)


def _put(storage: Storage, names: Sequence[str]) -> None:
    for name in names:
        storage.write_text(f"few/{name}", _TEXT)


def _get(storage: Storage, names: Sequence[str], target: Path) -> None:
    for name in names:
        storage.get_files("many", [name], target)


def _row(direction: str, bulk_s: float, single_s: float) -> dict[str, Any]:
    row = {
        "direction": direction, "files_per_s": 1 / bulk_s, "one_by_one_files_per_s": 1 / single_s,
        "times_faster": single_s / bulk_s,
    }  # fmt: skip
    logger.info("%s", row)
    return row
