"""Which workers are asked for, trackers that are missing, locks that a killed build left."""

import os
import time
from pathlib import Path

import pytest

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.train.curve import draw_curve
from llava_ray.train.resources import Node, WorkerPlan, plan_workers
from llava_ray.train.trackers import check_trackers
from llava_ray.train.zero import clear_stale_locks, zero_config


def test_defaults_follow_the_cluster() -> None:
    assert plan_workers(TrainConfig(), [Node(2, 0)]) == WorkerPlan(1, 2, 0)
    assert plan_workers(TrainConfig(num_workers=2), [Node(2, 0)]) == WorkerPlan(2, 1, 0)
    assert plan_workers(TrainConfig(), [Node(16, 2), Node(16, 2)]) == WorkerPlan(4, 4, 1)
    assert plan_workers(TrainConfig(), [Node(4, 2), Node(4, 0)]) == WorkerPlan(2, 2, 1)


@pytest.mark.parametrize(
    ("train", "nodes"),
    [
        (TrainConfig(num_workers=3), [Node(2, 0)]),
        (TrainConfig(num_workers=2, cpus_per_worker=2), [Node(3, 0)]),
        (TrainConfig(num_workers=3), [Node(16, 1), Node(16, 1), Node(64, 0)]),
        (TrainConfig(cpus_per_worker=8), [Node(4, 1)]),
        (TrainConfig(), []),
    ],
)
def test_workers_that_never_fit_are_refused(train: TrainConfig, nodes: list[Node]) -> None:
    with pytest.raises(ResourceError, match=r"train\.num_workers=\d with .*the cluster holds"):
        plan_workers(train, nodes)


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        plan_workers(TrainConfig(precision="fp16"), [Node(4, 0)])


def test_a_missing_tracker_names_its_package() -> None:
    check_trackers(TrainConfig())
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(TrainConfig(trackers=("wandb",)))


def test_offload_and_precision_reach_deepspeed() -> None:
    train = TrainConfig(zero_stage=3, offload="optimizer+weights", gradient_accumulation=4)
    found = zero_config(train, "bf16", gpu=True)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert found["gradient_accumulation_steps"] == 4


def test_a_lock_without_a_builder_is_removed(tmp_path: Path) -> None:
    old, fresh = tmp_path / "old" / "lock", tmp_path / "fresh" / "lock"
    for lock in (old, fresh):
        lock.parent.mkdir()
        lock.touch()
    long_ago = time.time() - 3600
    os.utime(old, (long_ago, long_ago))
    clear_stale_locks(tmp_path)
    assert not old.exists()
    assert fresh.exists()


def test_curve_is_a_picture(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 3 - i / 10, "lr": 1e-4} for i in range(1, 20)]
    draw_curve([*lines, {"step": 19, "eval_loss": 1.5}], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
