"""Trainings that were cut off, and whose id the same command no longer comes to.

Beside the checkpoints of each lies what its id is made of. Where the code's revision or a library
is another since, the training starts anew, says what lies there, and `--resume ID` goes on from it.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from llava_ray.artifacts.identity import REVISIONS
from llava_ray.artifacts.inventory import changes
from llava_ray.artifacts.records import AdapterCheckpoint
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ConfigError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Below a training's work folder."""
_ORIGIN = "origin.json"


def note(store: ArtifactStore, id: str, settings: Mapping[str, Any], dataset: str) -> None:
    """Write beside a training's checkpoints what shapes it."""
    store.storage.create_text(f"work/{id}/{_ORIGIN}", json.dumps(_origin(settings, dataset)))


def offer(store: ArtifactStore, id: str, settings: Mapping[str, Any], dataset: str) -> None:
    """Log which trainings would go on here, were their code and libraries those of today."""
    now = _origin(settings, dataset)
    for other, origin in _unfinished(store):
        if other != id and _apart_from_versions(origin) == _apart_from_versions(now):
            why = "; ".join(changes(origin, now))
            logger.warning(
                "train: %s was cut off and is not gone on with (%s): to do so, give --resume %s",
                other, why, other,
            )  # fmt: skip


def check_origin(store: ArtifactStore, id: str, settings: Mapping[str, Any], dataset: str) -> None:
    """Raise ConfigError where more than code, libraries and workers differ from its beginning."""
    origin = dict(_unfinished(store)).get(id)
    if origin is None:
        return
    before, now = map(_apart_from_versions, (origin, _origin(settings, dataset)))
    if before != now:
        raise ConfigError(
            f"train.resume_from={id!r} was begun with other settings "
            f"({'; '.join(changes(before, now))}): give those, or leave --resume out"
        )


def last_checkpoint(store: ArtifactStore, id: str) -> str:
    """Return the URI of an unfinished training's last checkpoint.

    Raises ConfigError where it has none, and names those that there are.
    """
    from ray.train import Result

    uri = f"{store.work_uri(id)}/{CHECKPOINTS}"
    try:
        checkpoint = Result.from_path(uri).checkpoint
    except RuntimeError:
        checkpoint = None
    if checkpoint is None:
        there = ", ".join(other for other, _ in _unfinished(store)) or "none"
        raise ConfigError(
            f"train.resume_from={id!r}: no checkpoint of it lies in {uri}; unfinished: {there}"
        )
    scheme, separator, _ = uri.partition("://")
    return f"{scheme}{separator}{checkpoint.path}" if separator else checkpoint.path


def _unfinished(store: ArtifactStore) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in store.storage.list_folders("work"):
        text = store.storage.read_text(f"work/{name}/{_ORIGIN}")
        if text is not None:
            yield name, json.loads(text)


def _origin(settings: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    revision = REVISIONS[AdapterCheckpoint.kind]
    origin = {"settings": settings, "dataset": dataset, "revision": revision}
    # As it is read back.
    return dict(json.loads(json.dumps(origin)))


def _apart_from_versions(origin: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in origin["settings"].items() if key != "versions"}
    # As with torchrun, other workers may go on: samples keep their order.
    settings["train"] = {**settings["train"], "resume_from": None, "num_workers": None}
    return {**origin, "settings": settings, "revision": None}
