"""The timing of methods: rows of several calls are kept, and a failure is a row."""

import json
from pathlib import Path

import pytest
from quantize_inputs import TINY

from llava_ray.bench import quantize as bench
from llava_ray.errors import ConfigError


def test_rows_are_measured_kept_and_told_apart_from_failures(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "out.json"
    bench.run(out, tmp_path, TINY, ["bnb-nf4"])
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path_factory.mktemp("empty")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    text = bench.run(out, tmp_path, TINY, ["awq-w4-g128"])
    tree = json.loads(out.read_text())
    good, failed = tree["rows"]
    assert (good["slug"], good["status"]) == ("bnb-nf4", "ok")
    assert 0 < good["read_s"] + good["quantize_s"] + good["write_s"] <= good["total_s"] + 0.03
    assert good["size_bytes"] == pytest.approx(good["estimated_bytes"], rel=0.02)
    assert good["host_peak_bytes"] > good["size_bytes"]
    assert failed["status"] == "failed"
    assert "AutoAWQ's environment could not be set up" in failed["reason"]
    assert tree["sum_s"] == good["total_s"]
    assert "| bnb-nf4 | " in text and "| awq-w4-g128 | " in text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"results", "calibration"}, "variants are measured, not kept"


def test_unknown_slugs_are_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'hqq-w5-g64'"):
        bench.run(tmp_path / "out.json", tmp_path / "work", None, ["bnb-nf4", "hqq-w5-g64"])
    assert not list(tmp_path.iterdir())
