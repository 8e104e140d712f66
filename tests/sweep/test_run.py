"""Whole sweeps over a model of a second: trials that crash or diverge, and scores of captions."""

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config_for, small_model, squares

from llava_ray import sweep
from llava_ray.artifacts import DatasetRecord
from llava_ray.config import RunConfig
from llava_ray.trial_score import scorer_for

pytestmark = pytest.mark.timeout(300)


class Bench:
    def __init__(self, root: Path) -> None:
        self.store = root / "store"
        self.model = small_model(root / "model")
        self.dataset: DatasetRecord = squares(self.store)

    def config(self, space: dict[str, Any], *overrides: str) -> RunConfig:
        config = config_for(
            self.store, self.model, "train.batch_size=2", "train.max_steps=9", *overrides
        )
        return config.model_copy(update={"sweep": config.sweep.model_copy(update={"space": space})})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sweep"))


def test_a_crash_is_a_row_and_a_loss_that_is_not_finite_ends_its_trial(
    bench: Bench, ray_local: None
) -> None:
    # At such a rate queries stay in bounds behind their softmax, and a gated product does not.
    space = {"lora_targets": {"grid": [["q_proj"], ["gate_proj", "up_proj"], ["?"]]}}
    config = bench.config(space, "train.learning_rate=1e30", "train.max_failures=0")
    result = sweep.run(config, bench.dataset)
    good, bad, crashed = result.trials
    assert (good.status, good.steps) == ("finished", 9)
    assert bad.status == "diverged" and bad.value is None and bad.steps < 9
    assert crashed.status == "failed" and "train.lora_targets '?'" in (crashed.error or "")
    assert result.best == good.settings
    assert result.best_value == good.value and math.isfinite(result.best_value)
    assert sweep.run(config, bench.dataset) == result, "found, not run again"
    assert not list((bench.store / "work").iterdir())
    report = (Path(result.uri) / "report.md").read_text()
    assert "| failed |" in report and "| diverged |" in report


def test_trials_are_judged_by_the_captions_of_the_quantized_model(
    bench: Bench, ray_local: None
) -> None:
    config = bench.config(
        {"learning_rate": {"grid": [1e-2]}}, "sweep.objective=rouge_l after hqq-w4-g32",
        "benchmark.caption_samples=2", "benchmark.max_new_tokens=8", "sweep.scheduler=fifo",
    )  # fmt: skip
    result = sweep.run(config, bench.dataset, scorer_for(config))
    (trial,) = result.trials
    assert trial.status == "finished", trial.error
    assert result.objective == "1 - rouge_l after hqq-w4-g32"
    assert trial.value is not None and 0 <= trial.value <= 1
    left = {path.name for path in bench.store.iterdir()} - {".staging"}
    assert left == {"dataset", "sweep", "work"}, "merged and quantized models are not kept"
    assert not list((bench.store / "work").iterdir())
