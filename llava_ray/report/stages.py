"""What each stage of a run took, read from the manifests below its storage."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts import records
from llava_ray.artifacts.code_digest import with_digests
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ConfigError

_STAGES: dict[type[records.Record], tuple[str, set[str]]] = {
    records.DatasetRecord: ("prepare", {"num_train", "num_test"}),
    records.AdapterCheckpoint: ("train", {
        "num_workers", "zero_stage", "steps", "samples_per_s", "peak_memory_bytes", "train_loss",
    }),
    records.MergedModel: ("merge", {
        "peak_memory_bytes", "max_logit_difference", "rounded_max_logit_difference",
    }),
    records.QuantizationRun: ("quantize", {"variant_wall_s", "failures"}),
    records.Variant: ("variant", {"slug", "quantize_s", "peak_memory_bytes", "bits_per_weight"}),
    records.Scorecard: ("benchmark", {
        "slug", "memory_bytes", "load_s", "prefill_s", "decode_tokens_per_s", "kl_divergence",
        "top1_agreement",
    }),
    records.ChosenVariant: ("choose", {"slug", "against"}),
    records.DeploymentRecord: ("deploy", {"slug"}),
}  # fmt: skip
"""By record: the stage's name, and which of the record's own fields are shown."""


def collect(uris: Sequence[str], out: Path, note: str = "", kept_ids: Collection[str] = ()) -> Path:
    """Write every stage's time, device, size and memory as JSON, with the newest report's rows.

    `uris` are storages, as in storage.uri; rows that `out` has of `kept_ids` stay, whose storages
    may be gone. Raises ConfigError where no storage holds a finished stage, or an id is not there.
    """
    kept = _kept(out, kept_ids)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    for store in map(ArtifactStore, uris):
        for record_type, (stage, fields) in _STAGES.items():
            for record in store.find_all(record_type):
                rows.append(_row(stage, record, fields))
                if isinstance(record, records.ChosenVariant):
                    text = store.storage.read_text(f"{record.kind}/{record.id}/report.json")
                    report = json.loads(text) if text else report
    if not rows:
        raise ConfigError(f"no finished stage at {', '.join(uris)}: run 'llava-ray pipeline' first")
    out.parent.mkdir(parents=True, exist_ok=True)
    tree = {"note": note, "stages": [*kept, *rows], **report}
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def _kept(out: Path, ids: Collection[str]) -> list[dict[str, Any]]:
    if not ids:
        return []
    try:
        rows = with_digests(json.loads(out.read_text(encoding="utf-8")), "stages")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{out}: no earlier rows can be read there ({error})") from error
    found = [row for row in rows if row["id"] in ids]
    if missing := sorted(set(ids) - {row["id"] for row in found}):
        raise ConfigError(f"{out} has no row of {', '.join(missing)}: ids are in its stages")
    return found


def _row(stage: str, record: records.Record, fields: set[str]) -> dict[str, Any]:
    common = {"stage": stage, "id": record.id, "device": record.device, "wall_s": record.wall_s}
    own = record.model_dump(mode="json", include=fields)
    row = {**common, "size_bytes": record.size_bytes, **own}
    if isinstance(record, records.Variant):
        row["weight_files"] = {
            name: entry.size_bytes
            for name, entry in record.files.items()
            if name.endswith((".gguf", ".safetensors"))
        }
    return row
