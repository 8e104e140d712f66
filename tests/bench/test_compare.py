"""Two variants beside each other, on figures that are made up."""

import json
from pathlib import Path

import pytest
from measured_run import FAILURES, make_config, make_scorecards

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench import compare
from llava_ray.config.run import RunConfig
from llava_ray.errors import VariantError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    cards = {card.slug: card for card in make_scorecards(tmp_path)}
    failures = {failure.slug: failure for failure in FAILURES}

    def measured(config: RunConfig) -> list[object]:
        return [(cards | failures)[slug] for slug in config.quantize.variants]

    monkeypatch.setattr(compare, "run_benchmark", measured)
    return make_config(tmp_path)


def test_the_difference_is_paired_by_sample(config: RunConfig, tmp_path: Path) -> None:
    out = compare.compare(config, "gguf-q2_k", "bnb-nf4", tmp_path / "results" / "out.json")
    tree = json.loads(out.read_text())
    assert tree["code_digest"] == code_digest("awq_calibration")
    assert list(tree["variants"]) == ["gguf-q2_k", "bnb-nf4"]
    assert tree["variants"]["bnb-nf4"]["kl_divergence"]["median"] == 0.0312
    difference = tree["kl_difference"]
    assert difference["mean"] == pytest.approx(0.211 - 0.0312)
    # Samples have 0.6, 1 and 1.4 times the mean, in both variants alike.
    assert difference["low"] == pytest.approx(0.6 * (0.211 - 0.0312))
    assert difference["high"] == pytest.approx(1.4 * (0.211 - 0.0312))
    assert str(tmp_path) not in out.read_text()


def test_a_variant_that_failed_is_no_comparison(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="'awq-w4-g128': needs"):
        compare.compare(config, "awq-w4-g128", "bnb-nf4", tmp_path / "out.json")
