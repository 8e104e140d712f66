"""The timing of methods: a failure is a row, and nothing that was made is kept."""

import json
from pathlib import Path

import pytest
from quantize_inputs import TINY

from llava_ray.bench import quantize as bench
from llava_ray.errors import ConfigError


def test_methods_are_timed_and_failures_are_rows(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "out.json"
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path_factory.mktemp("empty")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    bench.run(out, tmp_path, TINY, ["bnb-nf4", "awq-w4-g128"])
    good, failed = json.loads(out.read_text())["rows"]
    assert (good["slug"], good["failed"]) == ("bnb-nf4", "")
    assert 0 < good["read_s"] + good["quantize_s"] + good["write_s"] <= good["total_s"] + 0.03
    assert good["size_bytes"] == pytest.approx(good["estimated_bytes"], rel=0.02)
    assert good["host_peak_bytes"] > good["size_bytes"]
    assert failed["slug"] == "awq-w4-g128"
    assert "AutoAWQ's environment could not be set up" in failed["failed"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"results", "calibration"}, "variants are measured, not kept"


def test_unknown_slugs_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'hqq-w5-g64'"):
        bench.run(tmp_path / "out.json", tmp_path / "work", None, ["bnb-nf4", "hqq-w5-g64"])
    assert not list(tmp_path.iterdir())
