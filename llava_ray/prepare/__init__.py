"""Turn captions and images into LLaVA JSON with a fixed split."""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llava_ray.artifacts.code_digest import digest_of
from llava_ray.artifacts.identity import artifact_id, versions
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.chat_template import IMAGE_TOKEN
from llava_ray.prepare.checked import checked_rows, content_sha256
from llava_ray.prepare.parts import Part, opened_parts
from llava_ray.prepare.rows import Rejection
from llava_ray.prepare.shards import DatasetWriter
from llava_ray.prepare.sources import SCENE_TEXT
from llava_ray.prepare.split import Shown

logger = logging.getLogger(__name__)

_DRAWING = ("llava_ray.embedded.scene_text",)
"""The code from which, with the count and the seed, the pictures follow."""
SHOWN_REJECTIONS = 5
REJECTED = "rejected.jsonl"


def run(config: RunConfig) -> DatasetRecord:
    """Write train.json, test.json, images-*.tar and rejected.jsonl from what data.source names.

    Raises ConfigError for a source or columns that are not there, DataError when more rows are
    rejected than data.max_rejected_share or fewer than two are left.
    """
    if IMAGE_TOKEN in config.data.question:
        raise ConfigError(f"data.question {config.data.question!r}: leave {IMAGE_TOKEN} out")
    store = ArtifactStore(config.storage.uri)
    if config.data.source == SCENE_TEXT and not config.data.mix:
        # Drawing takes seconds, so an existing artifact is looked for by what shapes the drawing.
        settings = _settings(config.data, digest_of(_DRAWING))
        found = store.find(DatasetRecord, artifact_id(DatasetRecord.kind, settings))
        if found:
            return _accepted(found, config.data)
    with opened_parts(config.data) as parts:
        if config.data.source != SCENE_TEXT or config.data.mix:
            content = " ".join(content_sha256(part) for part in parts)
            digest = hashlib.sha256(content.encode()).hexdigest()
            settings = _settings(config.data, digest, parts)
        identity = artifact_id(DatasetRecord.kind, settings)
        found = store.find(DatasetRecord, identity)
        if found:
            return _accepted(found, config.data)
        return _build(store, identity, settings, config.data, parts)


def _accepted(found: DatasetRecord, config: DataConfig) -> DatasetRecord:
    """Return a data set that was made before, perhaps under another data.max_rejected_share."""
    first = f"see {found.uri}/{REJECTED}"
    _check_share(config, found.num_rows, Counter(found.rejected), first)
    return found


def _build(
    store: ArtifactStore,
    identity: str,
    settings: dict[str, Any],
    config: DataConfig,
    parts: Sequence[Part],
) -> DatasetRecord:
    with store.build(DatasetRecord, identity, settings=settings) as build:
        if build.found:
            return build.found
        shown, repeats, counts = Shown(), array("i"), Counter[str]()
        used = Counter[str]()
        first: list[Rejection] = []
        with (
            closing(DatasetWriter(build.folder)) as writer,
            (build.folder / REJECTED).open("w", encoding="utf-8") as rejected,
        ):
            for part, row in checked_rows(parts):
                if isinstance(row, Rejection):
                    told = asdict(row)
                    if len(parts) > 1:
                        told["source"] = part.config.source
                    rejected.write(json.dumps(told, ensure_ascii=False) + "\n")
                    counts[row.reason] += 1
                    first += [row] if len(first) < SHOWN_REJECTIONS else []
                    continue
                used[part.folder] += 1
                writer.add(row, folder=part.folder)
                shown.add(row)
                # Of rows that are held out each counts once.
                repeats.append(part.repeats(row.number))
            try:
                _check_counts(config, len(writer), first, counts)
                _check_parts(parts, used)
            except DataError as error:
                rejected.close()
                raise DataError(f"{error}{_kept(store, identity, build.folder)}") from error
            held_out = shown.held_out(test_share=config.test_share, seed=config.seed)
            train = np.repeat(np.flatnonzero(~held_out), np.array(repeats)[~held_out])
            if not len(train):
                raise DataError("data.mix: its weights leave no row to train on: raise them")
            test = np.flatnonzero(held_out)
            writer.finish(train.tolist(), test.tolist())
        rows = len(train), len(test), counts.total()
        logger.info("prepare: %d train and %d test rows, %d rejected", *rows)
        return build.finish(
            DatasetRecord,
            device="cpu",
            source=config.named,
            num_train=len(train),
            num_test=len(test),
            num_rows=len(writer),
            num_exchanges=sum(writer.turns),
            num_images=len(writer.shown),
            rejected=dict(sorted(counts.items())),
        )


_NOT_SHAPING = {
    "cache_bytes", "max_rejected_share", "source", "images", "image_column", "caption_column",
    "question_column", "mix",
}  # fmt: skip
"""What only says where rows are and how they are found: the content's digest has the outcome."""


def _settings(
    config: DataConfig, content_sha256: str, parts: Sequence[Part] = ()
) -> dict[str, Any]:
    read = [
        {"columns": part.reader.columns, "question": part.config.question, "weight": part.weight}
        for part in parts
    ]
    return {
        **config.model_dump(mode="json", exclude=_NOT_SHAPING),
        "parts": read,
        "content_sha256": content_sha256,
        "versions": versions("pillow"),
    }


def _check_counts(
    config: DataConfig, num_rows: int, rejections: Sequence[Rejection], counts: Counter[str]
) -> None:
    """rejections: the first ones."""
    for rejection in rejections:
        logger.warning(
            "prepare: row %d (%s) rejected, %s: %s",
            rejection.row, rejection.id, rejection.reason, rejection.detail,
        )  # fmt: skip
    first = rejections[0] if rejections else None
    where = f"first: row {first.row} {first.id!r}: {first.reason} {first.detail}" if first else ""
    by_reason = _check_share(config, num_rows, counts, where)
    if num_rows < 2:
        raise DataError(
            f"data.source {config.named!r}: {num_rows} usable rows of {num_rows + counts.total()}"
            f"{f' ({by_reason})' if by_reason else ''}, at least 2 are needed (train and test)"
        )


def _check_parts(parts: Sequence[Part], used: Counter[str]) -> None:
    for part in parts:
        if not used[part.folder]:
            raise DataError(f"data.mix: none of the rows of {part.config.source!r} can be used")


def _kept(store: ArtifactStore, identity: str, folder: Path) -> str:
    """Keep the list of rejected rows of a data set that is not made, and say where."""
    text = (folder / REJECTED).read_text(encoding="utf-8")
    place = f"work/{identity}/{REJECTED}"
    if not text:
        return ""
    store.storage.create_text(place, text)
    return f"; all are listed in {store.storage.join(place)}"


def _check_share(config: DataConfig, num_rows: int, counts: Counter[str], where: str) -> str:
    """Raise DataError where too many rows were rejected; return the reasons in words."""
    rejected = counts.total()
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if rejected > config.max_rejected_share * (rejected + num_rows):
        raise DataError(
            f"data.source {config.named!r}: {rejected} of {rejected + num_rows} rows rejected "
            f"({by_reason}), more than data.max_rejected_share={config.max_rejected_share:g}; "
            f"{where}"
        )
    return by_reason
