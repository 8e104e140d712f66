"""Which workers are asked for, trackers that are missing, locks that a killed build left."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import Fleet, NodeType, Resources
from llava_ray.train import check_packages
from llava_ray.train.curve import draw_curve
from llava_ray.train.resources import WorkerPlan, plan_workers
from llava_ray.train.zero import zero_config


def make_fleet(*nodes: Resources, complete: bool = True) -> Fleet:
    counts = Counter(nodes)
    types = tuple(NodeType("node", each, count) for each, count in counts.items())
    return Fleet(types, complete, "auto")


def test_defaults_follow_the_nodes_that_there_can_be() -> None:
    def plan(*nodes: Resources, **changes: int) -> WorkerPlan:
        return plan_workers(TrainConfig(**changes), make_fleet(*nodes))

    assert plan(Resources(2)) == WorkerPlan(1, Resources(2))
    assert plan(Resources(2), num_workers=2) == WorkerPlan(2, Resources(1))
    assert plan(Resources(16, 2), Resources(16, 2)) == WorkerPlan(4, Resources(4, 1))
    assert plan(Resources(4, 2), Resources(4)) == WorkerPlan(2, Resources(2, 1))


def test_what_may_still_come_is_asked_for() -> None:
    """B1: nothing is up yet."""
    nothing = make_fleet(complete=False)
    assert plan_workers(TrainConfig(), nothing) == WorkerPlan(1, Resources(1))
    eight = plan_workers(TrainConfig(num_workers=8), replace(nothing, accelerator="gpu"))
    assert eight == WorkerPlan(8, Resources(1, 1))


@pytest.mark.parametrize(
    ("train", "nodes"),
    [
        (TrainConfig(num_workers=3), [Resources(2, 0)]),
        (TrainConfig(num_workers=2, cpus_per_worker=2), [Resources(3, 0)]),
        (TrainConfig(num_workers=3), [Resources(16, 1), Resources(16, 1), Resources(64, 0)]),
        (TrainConfig(cpus_per_worker=8), [Resources(4, 1)]),
        (TrainConfig(), []),
    ],
)
def test_workers_that_never_fit_are_refused(train: TrainConfig, nodes: list[Resources]) -> None:
    with pytest.raises(ResourceError, match=r"train\.num_workers=\d .*the cluster has"):
        plan_workers(train, make_fleet(*nodes))


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        plan_workers(TrainConfig(precision="fp16"), make_fleet(Resources(4, 0)))


def test_a_missing_tracker_names_its_package() -> None:
    check_packages(TrainConfig())
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_packages(TrainConfig(trackers=("wandb",)))


def test_offload_and_precision_reach_deepspeed() -> None:
    train = TrainConfig(zero_stage=3, offload="optimizer+weights", gradient_accumulation=4)
    found = zero_config(train, "bf16", gpu=True)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert found["gradient_accumulation_steps"] == 4


def test_curve_is_a_picture(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 3 - i / 10, "lr": 1e-4} for i in range(1, 20)]
    draw_curve([*lines, {"step": 19, "eval_loss": 1.5}], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
