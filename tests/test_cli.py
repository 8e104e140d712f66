import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray import cli, preflight
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.capacity import Fleet

JOBS = [
    "prepare",
    "train",
    "sweep",
    "merge",
    "quantize",
    "benchmark",
    "choose",
    "deploy",
    "pipeline",
]


def test_an_expected_failure_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "connect", lambda: None)
    monkeypatch.setattr(cli, "find_fleet", lambda config, **_: Fleet((), True, "cpu"))

    def stage(config: RunConfig) -> None:
        raise DataError("two\nlines")

    with pytest.raises(SystemExit) as caught:
        cli.run_job("test", stage, [f"storage.uri={tmp_path}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "connect", lambda: None)
    monkeypatch.setattr(cli, "find_fleet", lambda config, **_: Fleet((), True, "cpu"))

    def stage(config: RunConfig) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run_job("test", stage, [f"storage.uri={tmp_path}"])


def test_relative_storage_is_refused_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="'runs' is relative"):
        preflight.check_storage(RunConfig.model_validate({"storage": {"uri": "runs"}}))


@pytest.mark.parametrize("name", JOBS)
def test_every_job_script_refuses_an_unknown_key(name: str) -> None:
    done = run(f"jobs/{name}.py", "train.lora_rank=4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown key 'train.lora_rank'")
    assert "did you mean 'train.lora_r'" in done.stderr


def test_dry_run_prints_config_and_resources() -> None:
    done = run("jobs/pipeline.py", "--dry-run", "train.lora_r=5")
    assert done.returncode == 0, done.stderr
    assert "lora_r: 5" in done.stdout
    assert "# quantize awq-w4-g128: " in done.stdout
    size = spec_for("awq-w4-g128").estimated_bytes(EMBEDDED)
    assert f"about {size / 1e6:.1f} MB on disk" in done.stdout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
