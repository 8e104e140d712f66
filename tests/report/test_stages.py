"""What a run took, gathered from its manifests."""

import json
from pathlib import Path

import pytest
from measured_run import FAILURES, make_config, make_scorecards

from llava_ray import choose
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ConfigError
from llava_ray.report.stages import collect


def test_stages_and_the_report_are_gathered(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    chosen = choose.run(make_config(storage), make_scorecards(storage), list(FAILURES))
    out = collect([str(storage)], tmp_path / "out.json", note="random weights")
    tree = json.loads(out.read_text(encoding="utf-8"))
    assert tree["note"] == "random weights"
    assert tree["winner"] == chosen.slug
    assert tree["code_digest"] == code_digest("llava_7b_h100")
    variants = {row["id"]: row for row in tree["stages"] if row["stage"] == "variant"}
    records = ArtifactStore(str(storage)).find_all(Variant)
    assert {row.id for row in records} == set(variants)
    for record in records:
        assert variants[record.id]["size_bytes"] == record.size_bytes
        assert variants[record.id]["slug"] == record.slug


def test_rows_of_a_storage_that_is_gone_can_stay(tmp_path: Path) -> None:
    storage, out = tmp_path / "storage", tmp_path / "out.json"
    choose.run(make_config(storage), make_scorecards(storage), list(FAILURES))
    earlier = [{"id": "adapter-1", "stage": "train"}, {"id": "adapter-2"}]
    out.write_text(json.dumps({"code_digest": "1a2b3c4d5e6f", "stages": earlier}))
    collect([str(storage)], out, kept_ids=["adapter-1"])
    rows = json.loads(out.read_text(encoding="utf-8"))["stages"]
    assert rows[0]["code_digest"] == "1a2b3c4d5e6f"
    ids = [row["id"] for row in rows]
    assert ids[0] == "adapter-1" and "adapter-2" not in ids and len(ids) > 1
    with pytest.raises(ConfigError, match="no row of adapter-3"):
        collect([str(storage)], out, kept_ids=["adapter-1", "adapter-3"])
    out.write_text('{"stages": [{"id": "adapter-1"}, {"id": "adapter-1"}]}')
    with pytest.raises(ConfigError, match="no finished stage"):
        collect([str(tmp_path / "empty")], out, kept_ids=["adapter-1"])


def test_a_storage_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished stage"):
        collect([str(tmp_path)], tmp_path / "out.json")
