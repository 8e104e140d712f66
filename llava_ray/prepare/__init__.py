"""Turn captions and images into LLaVA JSON with a fixed split."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_ray.artifacts.code_digest import digest_of
from llava_ray.artifacts.identity import artifact_id, versions
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.chat_template import IMAGE_TOKEN
from llava_ray.prepare.pictures import hash_image_files, store_images
from llava_ray.prepare.rows import Rejection, Row, RowReader
from llava_ray.prepare.sources import SCENE_TEXT, open_file, open_table
from llava_ray.prepare.table import Table

logger = logging.getLogger(__name__)

SCENE_TEXT_ROWS = 240
_DRAWING = ("llava_ray.embedded.scene_text",)
"""The code from which, with the count and the seed, the pictures follow."""
SHOWN_REJECTIONS = 5


def run(config: RunConfig) -> DatasetRecord:
    """Write train.json, test.json, images/ and rejected.jsonl from what data.source names.

    Raises ConfigError for a source or columns that are not there, DataError when more rows are
    rejected than data.max_rejected_share or fewer than two are left.
    """
    if IMAGE_TOKEN in config.data.question:
        raise ConfigError(f"data.question {config.data.question!r}: leave {IMAGE_TOKEN} out")
    store = ArtifactStore(config.storage.uri)
    if config.data.source == SCENE_TEXT:
        # Drawing takes seconds, so an existing artifact is looked for by what shapes the drawing.
        settings = _settings(config.data, digest_of(_DRAWING))
        found = store.find(DatasetRecord, artifact_id(DatasetRecord.kind, settings))
        if found:
            return found
    with _opened(config.data) as (table, folder):
        reader = RowReader(table, config.data)
        if config.data.source != SCENE_TEXT:
            settings = _settings(config.data, _content_sha256(table, reader, folder))
        identity = artifact_id(DatasetRecord.kind, settings)
        return store.find(DatasetRecord, identity) or _build(
            store, identity, settings, config.data, table, reader, folder
        )


def _build(
    store: ArtifactStore,
    identity: str,
    settings: dict[str, Any],
    config: DataConfig,
    table: Table,
    reader: RowReader,
    folder: Path | None,
) -> DatasetRecord:
    num_rows = min(table.num_rows, config.limit or table.num_rows)
    with store.build(DatasetRecord, identity, settings=settings) as build:
        if build.found:
            return build.found
        checked = list(
            store_images(
                reader,
                source=folder,
                target=build.folder / "images",
                max_pixels=config.max_image_pixels,
                num_rows=num_rows,
            )
        )
        rows = [result for result in checked if isinstance(result, Row)]
        rejections = [result for result in checked if isinstance(result, Rejection)]
        counts = Counter(rejection.reason for rejection in rejections)
        _check_counts(config, rows, rejections, counts)
        train, test = split_rows(rows, test_share=config.test_share, seed=config.seed)
        _write_llava_json(train, build.folder / "train.json")
        _write_llava_json(test, build.folder / "test.json")
        lines = [json.dumps(asdict(rejection), ensure_ascii=False) for rejection in rejections]
        text = "".join(f"{line}\n" for line in lines)
        (build.folder / "rejected.jsonl").write_text(text, encoding="utf-8")
        left_out = sum(row.further_exchanges for row in rows)
        if left_out:
            logger.warning("prepare: %d further exchanges of conversations left out", left_out)
        logger.info(
            "prepare: %d train and %d test rows, %d rejected", len(train), len(test), counts.total()
        )
        return build.finish(
            DatasetRecord,
            device="cpu",
            source=config.source,
            num_train=len(train),
            num_test=len(test),
            rejected=dict(sorted(counts.items())),
            further_exchanges=left_out,
        )


@contextmanager
def _opened(config: DataConfig) -> Iterator[tuple[Table, Path | None]]:
    """Give the table and the folder of its images, drawing them first if they are generated."""
    if config.source != SCENE_TEXT:
        table = open_table(config)
        folder = Path(config.images).expanduser() if config.images else table.folder
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"data.images {config.images!r}: no such folder")
        yield table, folder
        return
    from llava_ray.embedded.scene_text import write_scene_text

    with TemporaryDirectory(prefix="llava_ray-scene-text-") as scratch:
        count = config.limit or SCENE_TEXT_ROWS
        captions = write_scene_text(Path(scratch), count=count, seed=config.seed)
        yield open_file(captions), captions.parent / "images"


def _settings(config: DataConfig, content_sha256: str) -> dict[str, Any]:
    libraries = {"versions": versions("pillow")}
    return {**config.model_dump(mode="json"), "content_sha256": content_sha256, **libraries}


def _content_sha256(table: Table, reader: RowReader, folder: Path | None) -> str:
    if folder is None or not reader.has_image_files:
        return table.sha256
    images = hash_image_files(reader, folder)
    return hashlib.sha256(f"{table.sha256} {images}".encode()).hexdigest()


def _check_counts(
    config: DataConfig,
    rows: Sequence[Row],
    rejections: Sequence[Rejection],
    counts: Counter[str],
) -> None:
    total = len(rows) + len(rejections)
    for rejection in rejections[:SHOWN_REJECTIONS]:
        logger.warning(
            "prepare: row %d (%s) rejected, %s: %s",
            rejection.row, rejection.id, rejection.reason, rejection.detail,
        )  # fmt: skip
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    share = len(rejections) / total
    if share > config.max_rejected_share:
        first = rejections[0]
        raise DataError(
            f"data.source {config.source!r}: {len(rejections)} of {total} rows rejected "
            f"({by_reason}), more than data.max_rejected_share={config.max_rejected_share:g}; "
            f"first: row {first.row} {first.id!r}: {first.reason} {first.detail}"
        )
    if len(rows) < 2:
        raise DataError(
            f"data.source {config.source!r}: {len(rows)} usable rows of {total}"
            f"{f' ({by_reason})' if by_reason else ''}, at least 2 are needed (train and test)"
        )


def _write_llava_json(rows: Sequence[Row], path: Path) -> None:
    content = [
        {
            "id": row.id,
            "image": row.image,
            "conversations": [
                {"from": "human", "value": f"{IMAGE_TOKEN}\n{row.question}"},
                {"from": "gpt", "value": row.caption},
            ],
        }
        for row in rows
    ]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def split_rows(rows: Sequence[Row], *, test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return train and test rows by a hash of each row's id, at least one of both.

    So a row stays where it is when others are added. `rows` has two or more entries.
    """
    places = [_place(row.id, seed) for row in rows]
    in_test = {i for i, place in enumerate(places) if place < test_share}
    if not in_test:
        in_test.add(places.index(min(places)))
    if len(in_test) == len(rows):
        in_test.remove(places.index(max(places)))
    train = [row for i, row in enumerate(rows) if i not in in_test]
    return train, [rows[i] for i in sorted(in_test)]


def _place(row_id: str, seed: int) -> float:
    """Map an id to [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
