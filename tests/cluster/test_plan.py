import math
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llava_ray.cluster.groups import NodeGroup, read_groups
from llava_ray.cluster.plan import (
    Interruptions,
    Market,
    makespan,
    markets_of,
    predict,
    unmeasured,
)
from llava_ray.cluster.rates import Rates, read_rates
from llava_ray.cluster.table import plan_table
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError

REPO = Path(__file__).parents[2]
CONFIG = load_config(None, ["train.epochs=1"])
RATES = Rates(
    accelerator="NVIDIA H100 80GB HBM3",
    how="a test",
    train_samples_per_s=10,
    train_batch_size=5,
    trained_parameters=100_000_000,
    merge_s=40,
    quantize_s={"bnb-nf4": 60, "hqq-w4-g64": 8},
    benchmark_s={"none-fp16": 30, "bnb-nf4": 20},
)


def market(*, spot: bool = False, gpus: int = 1, usd: float | None = 6.0) -> Market:
    group = NodeGroup("gpu", 16, gpus, 2e11, 0, 8, 0, spot)
    return Market(group, "H100", network_gbps=80, usd_per_hour=usd)


def test_one_gpu_takes_the_measured_time_and_pays_for_it() -> None:
    row = predict(CONFIG, market(), RATES, samples=3600, gpus=1)
    assert row.optimizer_steps == 720
    assert row.train_s == pytest.approx(360)
    assert (row.efficiency, row.nodes) == (1, 1)
    # bnb and hqq take a quarter of a GPU each, so they run side by side; the benchmark does not.
    assert (row.quantize_s, row.benchmark_s, row.merge_s) == (60, 50, 40)
    assert row.total_s == pytest.approx(510)
    assert row.gpu_hours == pytest.approx(510 / 3600)
    assert row.usd == pytest.approx(510 / 3600 * 6)


def test_more_nodes_pay_for_the_exchange_of_gradients() -> None:
    row = predict(CONFIG, market(), RATES, samples=3600, gpus=4)
    exchange_s = 2 * 3 / 4 * 100_000_000 * 2 / (80e9 / 8)
    assert row.optimizer_steps == 180
    assert row.train_s == pytest.approx(180 * (0.5 + exchange_s))
    assert row.efficiency == pytest.approx(0.5 / (0.5 + exchange_s))
    assert row.usd == pytest.approx(row.total_s / 3600 * 4 * 6)
    # Eight GPUs of one node exchange nothing over the network.
    assert predict(CONFIG, market(gpus=8), RATES, samples=3600, gpus=8).efficiency == 1
    assert predict(CONFIG, market(usd=None), RATES, samples=3600, gpus=4).usd is None


def test_efficiency_only_falls_with_more_nodes() -> None:
    rows = [predict(CONFIG, market(), RATES, samples=10**6, gpus=2**n) for n in range(9)]
    efficiencies = [row.efficiency for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    times = [row.train_s for row in rows]
    assert times == sorted(times, reverse=True)


def test_lost_spot_nodes_stretch_training_until_it_never_ends() -> None:
    often = Interruptions(per_node_hour=1, restart_s=300, checkpoint_every_s=600)
    calm = predict(CONFIG, market(spot=True), RATES, samples=3600, gpus=1)
    stormy = predict(CONFIG, market(spot=True), RATES, samples=3600, gpus=1, interruptions=often)
    assert stormy.train_s == pytest.approx(calm.train_s / (1 - 600 / 3600))
    never = predict(CONFIG, market(spot=True), RATES, samples=3600, gpus=6, interruptions=often)
    assert never.train_s is None and never.total_s is None and never.usd is None
    safe = predict(CONFIG, market(), RATES, samples=3600, gpus=6, interruptions=often)
    assert safe.train_s is not None


def simulated_stretch(often: Interruptions, nodes: int, work_s: float) -> float:
    """Play training on spot nodes: a loss takes the work since the checkpoint."""
    draw = random.Random(0)
    clock = saved = done = 0.0
    loss = draw.expovariate(nodes * often.per_node_hour / 3600)
    while done < work_s:
        until_saved = saved + often.checkpoint_every_s - done
        if clock + until_saved <= loss:
            clock, done = clock + until_saved, done + until_saved
            saved = done
            continue
        clock, done = loss + often.restart_s, saved
        loss = clock + draw.expovariate(nodes * often.per_node_hour / 3600)
    return clock / work_s


@pytest.mark.parametrize("nodes", [1, 4, 16])
def test_the_price_of_interruptions_agrees_with_a_simulation(nodes: int) -> None:
    often = Interruptions(per_node_hour=0.05, restart_s=300, checkpoint_every_s=600)
    stretch = often.stretch(nodes)
    assert stretch is not None and stretch > 1
    played = simulated_stretch(often, nodes, work_s=3e7)
    # The formula lets nodes be lost while they restart too, and so errs on the dear side.
    assert played == pytest.approx(stretch, rel=0.03)
    assert played - 1 <= (stretch - 1) * 1.05


def test_rates_are_read_from_json_results_too(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(RATES.model_dump_json())
    assert read_rates(path) == RATES


def test_rates_of_another_gpu_need_a_relative_speed() -> None:
    other = Market(market().group, "A100", 24, None)
    with pytest.raises(ConfigError, match="gpu has A100, the rates are of NVIDIA H100"):
        predict(CONFIG, other, RATES, samples=3600, gpus=1)
    half = predict(CONFIG, other, RATES, samples=3600, gpus=1, relative_speed=0.5)
    assert half.train_s == pytest.approx(720)


def test_what_was_not_measured_is_named() -> None:
    left_out = unmeasured(CONFIG, RATES)
    assert not any(part.startswith("merge") for part in left_out)
    quantize = next(part for part in left_out if part.startswith("quantize"))
    assert "awq-w4-g128" in quantize and "bnb-nf4" not in quantize


@pytest.mark.parametrize(
    ("jobs", "gpus", "seconds"),
    [
        ([], 2, 0),
        ([(10, 1), (10, 1), (10, 1)], 1, 30),
        ([(10, 1), (10, 1), (10, 1)], 2, 20),
        ([(10, 0.25)] * 4, 1, 10),
        ([(10, 0.25)] * 5, 1, 20),
        ([(10, 0.25)] * 4 + [(5, 1)], 1, 15),
        ([(50, 0), (10, 1)], 1, 50),
        ([(9, 1), (5, 1), (4, 1)], 2, 9),
    ],
)
def test_shares_of_gpus_are_scheduled(
    jobs: list[tuple[float, float]], gpus: int, seconds: float
) -> None:
    assert makespan(jobs, gpus) == pytest.approx(seconds)


def test_the_clusters_tell_what_their_gpus_are() -> None:
    markets = markets_of(read_groups(REPO / "cluster" / "aws.yaml"))
    assert [(m.group.name, m.accelerator) for m in markets] == [
        ("gpu_spot", "H100"),
        ("gpu_on_demand", "H100"),
    ]
    with pytest.raises(ConfigError, match="metadata.accelerator says nothing of 'gpu-spot'"):
        markets_of(read_groups(REPO / "cluster" / "kuberay" / "rayjob.yaml"))
    with pytest.raises(ConfigError, match="no node group with GPUs"):
        markets_of(read_groups(REPO / "cluster" / "local.yaml"))


def test_the_trained_parameters_are_those_of_the_default_lora_on_7b() -> None:
    hidden, intermediate, layers, vision = 4096, 11008, 32, 1024
    linear = 4 * 2 * hidden + 3 * (hidden + intermediate)
    lora = layers * CONFIG.train.lora_r * linear
    projector = vision * hidden + hidden + hidden * hidden + hidden
    rates = read_rates(REPO / "cluster" / "rates.yaml")
    assert rates.trained_parameters == lora + projector


def test_the_job_script_prints_1_to_256_gpus(tmp_path: Path) -> None:
    priced = tmp_path / "aws.yaml"
    text = (REPO / "cluster" / "aws.yaml").read_text()
    priced.write_text(text.replace("usd_per_hour: {}", "usd_per_hour: {gpu_on_demand: 10}"))

    done = subprocess.run(
        [sys.executable, "jobs/plan.py", str(priced), "--samples", "25000"],
        cwd=REPO, capture_output=True, text=True, env={"PYTHONPATH": str(REPO), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [2**n for n in range(9)] * 2
    assert "no price: set metadata.usd_per_hour.gpu_spot" in done.stdout
    assert "max_workers is 8" in done.stdout
    # Steps of one GPU are those of the batch that was measured.
    assert int(rows[0][2]) == math.ceil(25000 / 4)


@pytest.mark.parametrize(
    ("cluster", "changed", "message"),
    [
        ("gcp.yaml", {}, "gpu_spot has A100, the rates are of H100"),
        ("aws.yaml", {"samples": 0}, "--samples 0: at least 1"),
        ("aws.yaml", {"rates": REPO / "cluster" / "aws.yaml"}, "accelerator: Field required"),
        ("aws.yaml", {"rates": REPO / "gone.yaml"}, "gone.yaml: cannot be read"),
        ("aws.yaml", {"measured": "/nowhere/at/all"}, "no finished training there"),
    ],
)
def test_a_plan_without_its_figures_is_refused(
    cluster: str, changed: dict[str, Any], message: str
) -> None:
    args = Namespace(
        cluster=REPO / "cluster" / cluster, samples=100, rates=REPO / "cluster" / "rates.yaml",
        measured=None, relative_speed=1, interruptions=0, restart_s=0, checkpoint_every_s=0,
    )  # fmt: skip
    vars(args).update(changed)
    with pytest.raises(ConfigError, match=message):
        plan_table(CONFIG, args)
