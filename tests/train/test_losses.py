"""What is known of the loss must not depend on how often it is logged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.train.checkpoint import read_state
from llava_ray.train.trackers import read_metrics
from llava_ray.train.trainer import fit


def reports(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "reports.jsonl").read_text().splitlines()]


def test_the_mean_and_the_last_loss_are_the_same_when_little_is_logged(runs: Path) -> None:
    often, rarely = (reports(runs / name)[-1] for name in ("two_tail", "two_tail_unlogged"))
    assert rarely["train_loss"] == often["train_loss"]
    assert rarely["loss"] == often["loss"]
    logged = read_metrics(runs / "two_tail" / "step_20" / "metrics.jsonl")
    last_two = [line["loss"] for line in logged if "loss" in line][-2:]
    assert often["train_loss"] == pytest.approx(sum(last_two) / 2, rel=1e-12)


def test_a_run_that_goes_on_within_its_last_tenth_knows_the_same_mean(runs: Path) -> None:
    assert read_state(runs / "two_tail" / "step_19").tail_steps == 1
    assert reports(runs / "two_tail_resumed")[-1]["train_loss"] == pytest.approx(
        reports(runs / "two_tail")[-1]["train_loss"], rel=1e-6
    )


def test_the_last_step_is_logged(runs: Path) -> None:
    lines = read_metrics(runs / "two_tail_unlogged" / "step_20" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [20]


def test_a_loss_that_is_not_finite_between_logged_steps_ends_the_run_there(runs: Path) -> None:
    (report,) = reports(runs / "two_diverged")
    assert report["diverged"] and report["step"] < 10
    trainer: Any = SimpleNamespace(fit=lambda: SimpleNamespace(metrics=report))
    with pytest.raises(ConfigError) as caught:
        fit(lambda: trainer, TrainConfig())
    assert str(caught.value) == (
        f"the loss is no longer a finite number at step {report['step']}: lower "
        "train.learning_rate=0.0002 (or train.projector_learning_rate)"
    )
