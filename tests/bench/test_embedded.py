"""Scores of the embedded model over seeds; `jobs/bench/embedded.py` runs the whole of it."""

import statistics
from pathlib import Path

import pytest

from llava_ray.artifacts.records import VariantFailure
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.bench.embedded import _over_seeds, _scores, _with_seed, base_variant, score
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.folder import EMBEDDED, weights_sha256


def test_another_model_is_refused(tmp_path: Path) -> None:
    config = load_config(None, ["model.path=llava-hf/llava-1.5-7b-hf"])
    with pytest.raises(ConfigError, match="this scores 'embedded' alone"):
        score(config, tmp_path / "out.json")


def test_the_base_is_the_shipped_model_and_is_found_again(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    made = base_variant(store)
    assert weights_sha256(local_folder(made)) == weights_sha256(EMBEDDED)
    assert base_variant(store) == made


def test_seeds_change_the_training_alone() -> None:
    config = load_config(None, [])
    seeded = _with_seed(config, 2, only="none-fp16")
    assert (seeded.train.seed, seeded.data, seeded.quantize.variants) == (
        2, config.data, ("none-fp16",),
    )  # fmt: skip
    scores = {0: {"rouge_l": 0.5}, 1: {"rouge_l": 0.7}}
    assert _over_seeds(scores, statistics.mean) == {"rouge_l": pytest.approx(0.6)}


def test_a_baseline_without_scores_is_named() -> None:
    config = load_config(None, [])
    with pytest.raises(VariantError, match="'none-fp16' was not measured"):
        _scores(config, [VariantFailure(slug="none-fp16", reason="it broke")])
