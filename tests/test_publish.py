"""`llava-ray publish`: what a repository of the hub would hold, and what keeps it from going up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measured_run import make_config, make_scorecards

from llava_ray import choose

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    choose.run(make_config(folder), make_scorecards(folder), [])
    return folder


def publish(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder), **environment}
    outside = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return subprocess.run(
        [sys.executable, ROOT / "jobs/publish.py", *arguments], cwd=folder, env=outside | own,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_dry_run_writes_what_the_repository_would_hold(storage: Path, tmp_path: Path) -> None:
    asked = ("--repo", "me/signs", f"storage.uri={storage}", "--dry-run")
    done = publish(tmp_path, *asked)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "signs"
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "passport.json", "model.safetensors"}
    assert json.loads((folder / "passport.json").read_text())[0]["reader"] == "transformers-4"
    assert all(name in done.stdout for name in names)
    again = publish(tmp_path, *asked)
    assert again.returncode == 2 and "signs is there already" in again.stderr


@pytest.mark.parametrize(
    ("repo", "environment", "reason"),
    [
        ("me/signs", {}, "no token for the hub: run 'hf auth login', or set HF_TOKEN"),
        ("me/a/b", {"HF_TOKEN": "hf_x"}, "--repo 'me/a/b': "),
        (
            "me/signs",
            {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.1:9"},
            "--repo 'me/signs'",
        ),
    ],
)
def test_what_cannot_go_up_is_one_line(
    repo: str, environment: dict[str, str], reason: str, storage: Path, tmp_path: Path
) -> None:
    done = publish(tmp_path, "--repo", repo, f"storage.uri={storage}", **environment)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_what_was_not_chosen_or_measured_is_said(storage: Path, tmp_path: Path) -> None:
    nothing = publish(tmp_path, "--repo", "me/signs", f"storage.uri={tmp_path}/none", "--dry-run")
    assert "has no chosen variant: run 'llava-ray choose' first" in nothing.stderr
    other = publish(
        tmp_path, "--repo", "me/x", "--variant", "awq-w4-g64", f"storage.uri={storage}", "--dry-run"
    )
    assert "--variant 'awq-w4-g64': " in other.stderr and other.returncode == 2
