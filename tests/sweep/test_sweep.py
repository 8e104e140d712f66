"""Whole sweeps over a model of a second: trials that crash or diverge, and scores of captions."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import config_for, small_model, squares

from llava_ray import sweep
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.config.run import RunConfig
from llava_ray.trial_score import scorer_for

pytestmark = pytest.mark.timeout(600)


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


def test_trials_are_scored_as_quantized_models_and_a_bad_one_is_a_row(
    bench: Bench, ray_local: None
) -> None:
    # At such a rate queries stay in bounds behind their softmax, and a gated product does not.
    space = {"lora_targets": {"grid": [["q_proj"], ["gate_proj", "up_proj"], ["?"]]}}
    config = bench.config(
        space, "train.learning_rate=1e30", "train.max_failures=0", "sweep.scheduler=fifo",
        "sweep.objective=rouge_l after hqq-w4-g32", "benchmark.caption_samples=2",
        "merge.dtype=bf16", "benchmark.max_new_tokens=8", "train.zero_stage=2",
    )  # fmt: skip
    result = sweep.run(config, bench.dataset, scorer_for(config))
    good, diverged, crashed = result.trials
    assert (good.status, good.steps) == ("finished", 9), good.error
    assert good.value is not None and 0 <= good.value <= 1
    assert diverged.status == "diverged" and diverged.value is None and diverged.steps < 9
    assert crashed.status == "failed" and "train.lora_targets '?'" in (crashed.error or "")
    assert (result.best, result.best_value) == (good.settings, good.value)
    assert result.objective == "1 - rouge_l after hqq-w4-g32"
    report = (Path(result.uri) / "report.md").read_text()
    assert "| failed |" in report and "| diverged |" in report
    # Found, not run again; and what the scores were made from is gone.
    assert sweep.run(config, bench.dataset, scorer_for(config)) == result
    assert {path.name for path in bench.store.iterdir()} - {".staging", ".leases"} == {
        "dataset", "sweep", "work",
    }  # fmt: skip
    assert not list((bench.store / "work").iterdir())
