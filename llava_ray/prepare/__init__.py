"""Turn captions and images into LLaVA JSON with a fixed split."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import digest_of
from llava_ray.artifacts.identity import artifact_id, versions
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.chat_template import IMAGE_TOKEN
from llava_ray.models.conversation import Sample
from llava_ray.prepare.parts import Part, opened_parts
from llava_ray.prepare.rows import Rejection, Row
from llava_ray.prepare.sources import SCENE_TEXT

logger = logging.getLogger(__name__)

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
    if config.data.source == SCENE_TEXT and not config.data.mix:
        # Drawing takes seconds, so an existing artifact is looked for by what shapes the drawing.
        settings = _settings(config.data, digest_of(_DRAWING))
        found = store.find(DatasetRecord, artifact_id(DatasetRecord.kind, settings))
        if found:
            return _accepted(found, config.data)
    with opened_parts(config.data) as parts:
        if config.data.source != SCENE_TEXT or config.data.mix:
            content = " ".join(part.content_sha256() for part in parts)
            digest = hashlib.sha256(content.encode()).hexdigest()
            settings = _settings(config.data, digest, parts)
        identity = artifact_id(DatasetRecord.kind, settings)
        found = store.find(DatasetRecord, identity)
        if found:
            return _accepted(found, config.data)
        return _build(store, identity, settings, config.data, parts)


def _accepted(found: DatasetRecord, config: DataConfig) -> DatasetRecord:
    """Return a data set that was made before, perhaps under another data.max_rejected_share."""
    first = f"see {found.uri}/rejected.jsonl"
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
        (build.folder / "images").mkdir()
        checked = [each for part in parts for each in part.checked(build.folder / "images")]
        rows = [result for result in checked if isinstance(result, Row)]
        rejections = [result for result in checked if isinstance(result, Rejection)]
        counts = Counter(rejection.reason for rejection in rejections)
        _check_counts(config, rows, rejections, counts)
        train, test = split_rows(rows, test_share=config.test_share, seed=config.seed)
        # Of rows that are held out each counts once.
        train = [row for row in train for _ in range(row.repeats)]
        if not train:
            raise DataError("data.mix: its weights leave no row to train on: raise them")
        _write_llava_json(train, build.folder / "train.json")
        _write_llava_json(test, build.folder / "test.json")
        lines = [json.dumps(asdict(rejection), ensure_ascii=False) for rejection in rejections]
        text = "".join(f"{line}\n" for line in lines)
        (build.folder / "rejected.jsonl").write_text(text, encoding="utf-8")
        logger.info(
            "prepare: %d train and %d test rows, %d rejected", len(train), len(test), counts.total()
        )
        return build.finish(
            DatasetRecord,
            device="cpu",
            source=config.named,
            num_train=len(train),
            num_test=len(test),
            num_rows=len(rows),
            num_exchanges=sum(len(row.turns) for row in rows),
            num_images=sum(len(row.images) for row in rows),
            rejected=dict(sorted(counts.items())),
        )


_NOT_SHAPING = {"max_rejected_share", "source", "images", "image_column", "caption_column", "mix"}
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
    config: DataConfig,
    rows: Sequence[Row],
    rejections: Sequence[Rejection],
    counts: Counter[str],
) -> None:
    for rejection in rejections[:SHOWN_REJECTIONS]:
        logger.warning(
            "prepare: row %d (%s) rejected, %s: %s",
            rejection.row, rejection.id, rejection.reason, rejection.detail,
        )  # fmt: skip
    first = rejections[0] if rejections else None
    where = f"first: row {first.row} {first.id!r}: {first.reason} {first.detail}" if first else ""
    by_reason = _check_share(config, len(rows), counts, where)
    if len(rows) < 2:
        raise DataError(
            f"data.source {config.named!r}: {len(rows)} usable rows of "
            f"{len(rows) + len(rejections)}{f' ({by_reason})' if by_reason else ''}, at least 2 "
            "are needed (train and test)"
        )


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


def _write_llava_json(rows: Sequence[Row], path: Path) -> None:
    samples = (Sample(row.id, _names(row), row.turns, row.system) for row in rows)
    content = [sample.as_llava() for sample in samples]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _names(row: Row) -> tuple[str, ...]:
    return tuple(image for image in row.images if isinstance(image, str))


def split_rows(rows: Sequence[Row], *, test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return train and test rows: of the share that is asked for, and no picture on both sides.

    Rows with a picture in common go together, in the order of a hash of what they show, so most
    stay where they are when others are added. `rows` has two or more entries.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(_connected([_shown(row) for row in rows])):
        groups.setdefault(key, []).append(index)
    if len(groups) == 1:
        logger.warning("prepare: all rows show the same picture, so none are held out")
        return list(rows), []
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    wanted = min(len(rows) - 1, max(1, round(test_share * len(rows))))
    held_out: set[int] = set()
    for key in order:
        if len(held_out) + len(groups[key]) <= wanted:
            held_out.update(groups[key])
    if not held_out:
        held_out.update(groups[min(order, key=lambda key: len(groups[key]))])
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def _shown(row: Row) -> tuple[str, ...]:
    """Return what tells rows apart: their pictures, or their text where there is none."""
    return row.contents or (hashlib.sha256(repr(row.turns).encode()).hexdigest(),)


def _connected(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """Return for each row one key that it shares with all rows it hangs together with."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent.setdefault(above, above)
            key = parent[key]
        return key

    for first, *others in keys:
        for other in others:
            # The smaller one, whatever the order of the rows.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(key[0]) for key in keys]
