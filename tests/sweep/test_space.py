"""Search spaces from YAML, and what a sweep makes of its trials."""

from pathlib import Path
from typing import Any

import pytest

from llava_ray.artifacts.records import SweepResult, Trial
from llava_ray.config.run import RunConfig, TrainConfig, changed, load_config
from llava_ray.errors import ConfigError
from llava_ray.resources.capacity import Fleet, NodeType, Resources
from llava_ray.sweep import best_trial
from llava_ray.sweep.pictures import write_report
from llava_ray.sweep.search import Search, concurrent_trials, total_steps
from llava_ray.sweep.space import check_space, domains, num_samples
from llava_ray.train.resources import WorkerPlan


def config(space: dict[str, Any], *overrides: str) -> RunConfig:
    base = load_config(None, overrides)
    return base.model_copy(update={"sweep": base.sweep.model_copy(update={"space": space})})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"learning_rat": {"choice": [1e-4]}}, "did you mean 'learning_rate'"),
        ({"lora_r": {"among": [1]}}, "is not one of"),
        ({"lora_r": [1, 2]}, "is not one of"),
        ({"lora_r": {"choice": []}}, "needs a list"),
        ({"learning_rate": {"uniform": [2, 1]}}, "low < high"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "positive bounds"),
        ({"lora_r": {"choice": [8, 0]}}, "greater than or equal to 1"),
        ({"lora_dropout": {"uniform": [0, 2]}}, "less than or equal to 1"),
    ],
)
def test_mistakes_in_a_space_are_named(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(config(space))


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="lora_q.*lora_alpha"):
        check_space(config({"lora_q": {"choice": [1]}, "lora_alpha": {"choice": [-1]}}))


def test_grid_is_refused_where_samples_are_drawn() -> None:
    with pytest.raises(ConfigError, match="use choice"):
        check_space(config({"lora_r": {"grid": [1, 2]}}, "sweep.scheduler=pbt"))


def test_domains_draw_within_their_bounds() -> None:
    drawn = domains(
        {"learning_rate": {"loguniform": [1e-5, 1e-3]}, "lora_r": {"choice": [8, 16]},
         "lora_dropout": {"uniform": [0, 0.2]}, "lora_alpha": {"grid": [16, 32]}}
    )  # fmt: skip
    assert all(1e-5 <= drawn["learning_rate"].sample() <= 1e-3 for _ in range(50))
    assert {drawn["lora_r"].sample() for _ in range(50)} == {8, 16}
    assert all(0 <= drawn["lora_dropout"].sample() <= 0.2 for _ in range(50))
    assert drawn["lora_alpha"] == {"grid_search": [16, 32]}


def test_a_grid_alone_is_walked_once() -> None:
    grid, mixed = {"lora_r": {"grid": [1, 2]}}, {"lora_alpha": {"choice": [1, 2]}}
    assert num_samples(config(grid, "sweep.num_trials=5").sweep) == 1
    assert num_samples(config(grid | mixed, "sweep.num_trials=5").sweep) == 5


def test_steps_and_trials_at_a_time() -> None:
    train = TrainConfig(batch_size=2, gradient_accumulation=3, epochs=2)
    assert total_steps(train, WorkerPlan(4, Resources(1, 1)), num_train=100) == 9
    assert (
        total_steps(train.model_copy(update={"max_steps": 5}), WorkerPlan(4, Resources(1, 1)), 100)
        == 5
    )
    gpus = Fleet((NodeType("node", Resources(8, 4), 2),), True, "auto")
    assert concurrent_trials(WorkerPlan(2, Resources(2, 1)), gpus) == 4
    assert concurrent_trials(WorkerPlan(8, Resources(2, 1)), gpus) == 1
    cpus = Fleet((NodeType("node", Resources(2)),), True, "auto")
    assert concurrent_trials(WorkerPlan(1, Resources(1, 0)), cpus) == 2


def trial(number: int, status: Any, value: float | None, rate: float) -> Trial:
    return Trial(
        number=number, status=status, settings={"learning_rate": rate, "lora_r": 8}, value=value,
        steps=9, error="boom" if status == "failed" else None,
    )  # fmt: skip


TRIALS = (
    trial(0, "finished", 2.0, 1e-4),
    trial(1, "finished", 1.5, 3e-4),
    trial(2, "stopped early", 1.4, 1e-3),
    trial(3, "diverged", None, 1.0),
    trial(4, "failed", None, 1e-5),
)


def test_the_best_trial_ran_to_its_end() -> None:
    assert best_trial(TRIALS).number == 1
    assert best_trial(TRIALS[2:]).number == 2
    with pytest.raises(ConfigError, match="boom; diverged"):
        best_trial(TRIALS[3:])


def test_best_settings_flow_into_the_train_section() -> None:
    result = SweepResult(
        id="sweep-1", uri="", parents=(), settings={}, code_version="", created="", wall_s=0,
        device="cpu", files={}, objective="eval_loss", best=TRIALS[1].settings, best_value=1.5,
        steps=1, steps_without_early_stop=1, trials=TRIALS,
    )  # fmt: skip
    config = load_config(None, ["train.epochs=3"])
    best = changed(config, train=result.best)
    expected = config.train.model_dump() | {"learning_rate": 3e-4, "lora_r": 8}
    assert best.train.model_dump() == expected
    assert best.merge == config.merge


def test_report_has_a_row_per_trial_and_the_curves(tmp_path: Path) -> None:
    curves = tuple(((1, 3.0), (9, t.value)) if t.value else () for t in TRIALS)
    write_report(Search(TRIALS, curves, 9, "cpu"), TRIALS[1], tmp_path, objective="eval_loss")
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n| ") == len(TRIALS) + 1
    assert "| 4 | failed | 1e-05 | 8 | 9 |  | boom |" in text
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "learning_curves.png" in text
