import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_cluster import HEAD_NODE, REPO, fake_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]


def test_nodes_come_the_work_spreads_and_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    with fake_cluster(tmp_path, workers=2) as head:
        captions = REPO / "tests" / "data" / "real" / "captions.jsonl"
        done = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("autoscaling_driver.py")),
                str(tmp_path / "runs"),
                str(captions),
            ],
            env={**os.environ, **head.environment(), "PYTHONPATH": str(REPO)},
            timeout=600,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert (report["before"], report["most"], report["after"]) == (1, 3, 1)
    assert set(report["status"].values()) == {"ok"}, report["status"]
    assert find_spec("awq") is None, "AutoAWQ must come with its task's own environment"
    assert len(report["ran_on"]) == 5
    assert len(set(report["ran_on"].values())) == 2
    assert HEAD_NODE not in report["ran_on"].values()
