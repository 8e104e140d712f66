"""The promises of a sweep, proved anew; jobs/results/sweep.json holds a run's figures."""

import json
import os
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("LLAVA_RAY_SLOW") != "1",
    reason="five sweeps of eight trials take ten minutes; set LLAVA_RAY_SLOW=1",
)
def test_sweeps_find_the_known_best_with_fewer_steps_and_survive_a_kill(tmp_path: Path) -> None:
    from proof import main

    main(tmp_path / "sweep.json")
    tree = json.loads((tmp_path / "sweep.json").read_text())
    assert all(row["found_known_best"] for row in tree["seeds"].values())
    assert all(row["share_of_steps"] < 1 for row in tree["seeds"].values())
    assert tree["without_asha"]["share_of_steps"] == 1
    assert tree["killed"]["finished_before_kill"] >= 2
    assert tree["killed"]["finished_trials_run_again"] == 0
