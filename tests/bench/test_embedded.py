"""Scores of the embedded model over seeds, on figures that are made up."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_run import FAILURES, make_scorecards
from quantize_inputs import parameters_of

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import Scorecard
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.bench import embedded
from llava_ray.bench.compare import base_variant
from llava_ray.bench.readme import TABLES
from llava_ray.config.run import RunConfig, changed, load_config
from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.folder import EMBEDDED

(FAILED,) = FAILURES
WORDS = {0: 0.5, 1: 0.6, 2: 0.7}
"""By seed: the share of words read."""


class Dataset:
    num_test = 7


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A config whose stages give made-up scorecards, with scores by the training's seed."""
    card = make_scorecards(tmp_path / "cards")[0]

    def made(config: RunConfig) -> list[Any]:
        names = ("word_recall", "character_error_rate", "rouge_l", "cider_d")
        scores = {"scores": dict.fromkeys(names, WORDS[config.train.seed])}
        return [
            FAILED if slug == FAILED.slug else card.model_copy(update={"slug": slug, **scores})
            for slug in config.quantize.variants
        ]

    def measured(config: RunConfig, variants: list[Scorecard], dataset: Dataset) -> list[Scorecard]:
        assert [card.slug for card in variants] == list(embedded.RECOVERY.values())
        return variants

    monkeypatch.setattr(embedded, "run_prepare", lambda config: Dataset())
    monkeypatch.setattr(embedded, "run_benchmark", made)
    monkeypatch.setattr(embedded, "run_quantize", made)
    monkeypatch.setattr(embedded.benchmark, "run", measured)
    monkeypatch.setattr(embedded.benchmark, "score_captions", lambda *_: card.scores)
    variants = f"quantize.variants=[gguf-q2_k, none-fp16, {FAILED.slug}]"
    return load_config(None, [f"storage.uri={tmp_path}", variants])


def test_another_model_is_refused(tmp_path: Path) -> None:
    config = load_config(None, ["model.path=llava-hf/llava-1.5-7b-hf"])
    with pytest.raises(ConfigError, match="this scores 'embedded' alone"):
        embedded.score(config, tmp_path / "out.json")


def test_the_base_is_the_shipped_model_and_is_found_again(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    made = base_variant(store, "none-fp16")
    written, shipped = parameters_of(local_folder(made)), parameters_of(EMBEDDED)
    assert written.keys() == shipped.keys()
    assert all(torch.equal(written[name], value) for name, value in shipped.items())
    assert base_variant(store, "none-fp16") == made


def test_the_fine_tune_is_scored_over_seeds(config: RunConfig, tmp_path: Path) -> None:
    tree = json.loads(embedded.score(config, tmp_path / "out.json").read_text())
    assert tree["code_digest"] == code_digest("embedded")
    assert tree["held_out_samples"] == 7
    found = {seed: scores["word_recall"] for seed, scores in tree["fine_tuned"].items()}
    assert found == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert tree["fine_tuned_mean"]["word_recall"] == pytest.approx(0.6)
    deviation = statistics.stdev(WORDS.values())
    assert tree["fine_tuned_standard_deviation"]["word_recall"] == pytest.approx(deviation)
    assert tree["variants"]["gguf-q2_k"]["scores"]["word_recall"] == 0.5
    assert tree["variants"][FAILED.slug] == {"failed": FAILED.reason}
    assert "60.0% ± 10.0%" in TABLES["embedded"][1](tree)


def test_a_baseline_without_scores_is_named(config: RunConfig, tmp_path: Path) -> None:
    config = changed(config, benchmark={"baseline": FAILED.slug})
    with pytest.raises(VariantError, match=f"variant '{FAILED.slug}': needs"):
        embedded.score(config, tmp_path / "out.json")


def test_recovery_compares_both_trainings_over_seeds(config: RunConfig, tmp_path: Path) -> None:
    tree = json.loads(embedded.recover(config, tmp_path / "out.json").read_text())
    assert tree["code_digest"] == code_digest("hqq_recovery")
    assert list(tree["rows"]) == list(tree["mean"]) == list(embedded.RECOVERY)
    rows = tree["rows"]["2-bit base, then LoRA"]
    assert [row["word_recall"] for row in rows] == [0.5, 0.6, 0.7]
    assert "| fine-tuned, then 2 bits | " in TABLES["hqq_recovery"][1](tree)
