"""The training benchmark in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench.train import ROWS, parse_row
from llava_ray.bench.train_rows import flop_per_sample
from llava_ray.errors import ConfigError
from llava_ray.models.shapes import LLAVA_7B

ROOT = Path(__file__).parents[2]


def bench(out: Path, *arguments: str) -> list[dict[str, object]]:
    """Run the job and return its rows."""
    # Threads that wait for each other would take longer than the tiny model's steps.
    threads = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **threads}
    subprocess.run(
        [sys.executable, "jobs/bench/train.py", "--tiny", "--out", str(out), *arguments],
        cwd=ROOT, env=environment, check=True, timeout=240,
    )  # fmt: skip
    tree = json.loads(out.read_text())
    assert tree["command"].endswith(" ".join(arguments))
    assert tree["versions"]["torch"] and tree["device"]
    assert tree["code_digest"] == code_digest("train_h100")
    rows: list[dict[str, object]] = tree["rows"]
    return rows


def test_rows_of_all_engines_start_from_the_same_losses(tmp_path: Path) -> None:
    names = ["plain-b1", "zero2-b4", "zero2-ckpt-b8", "replica-ray-b4", "zero3-ckpt-b4@2"]
    bench(tmp_path / "out.json", "--only", names[0])
    first = json.loads((tmp_path / "out.json").read_text())["rows"]
    rows = bench(tmp_path / "out.json", "--only", ",".join(names))
    assert [row["name"] for row in rows] == names
    assert rows[0] == first[0], "what was measured before stays"
    for row in rows:
        assert not row["failed"]
        assert 0 < row["samples_per_s_min"] <= row["samples_per_s"] <= row["samples_per_s_max"]
        assert row["check_losses"] == pytest.approx(rows[0]["check_losses"], rel=1e-4)
        assert row["check_grad_norm"] == pytest.approx(rows[0]["check_grad_norm"], rel=1e-4)
    losses = rows[0]["check_losses"]
    assert isinstance(losses, list)
    assert losses[2] < losses[0]


def test_a_row_that_cannot_run_is_recorded_and_the_rest_go_on(tmp_path: Path) -> None:
    rows = bench(tmp_path / "out.json", "--only", "plain-liger-b4,replica-b1")
    assert "liger" in str(rows[0]["failed"])
    assert not rows[1]["failed"]


@pytest.mark.parametrize("name", ["loop-b4", "plain-fast-b4", "plain-ckpt", "plain-bx"])
def test_unknown_rows_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}': no such row; a name is one of plain, "):
        parse_row(name)


def test_a_rows_name_says_what_it_is() -> None:
    row = parse_row("replica-mlp-dropout-b16")
    assert (row.engine, row.batch, row.checkpointing, row.lora_dropout) == (
        "replica", 16, "mlp", 0.05,
    )  # fmt: skip
    results = json.loads(Path("jobs/results/train_h100.json").read_text())["rows"]
    for written in results:
        known = vars(parse_row(written["name"]))
        for key in ("engine", "batch", "checkpointing", "fused_layers", "compile", "liger"):
            assert known[key] == written[key], written["name"]
    assert {row["name"] for row in results} >= set(ROWS)


def test_operations_of_the_7b_model() -> None:
    """6.476 billion weights in linear layers, twice 2 operations per weight and token, and more."""
    linear = 4 * 756 * 6_476_005_376
    assert linear < flop_per_sample(LLAVA_7B, 756) < 1.12 * linear
