"""Prove what sweeps promise on a model of a second, and write the figures as JSON.

python tests/sweep/proof.py jobs/results/sweep.json

Eight learning rates, of which the highest is known to be best: in so few steps it learns most,
and the model still takes it. Each seed is swept with ASHA; the first one's driver is killed
half-way and started again. Takes about 10 minutes on two cores.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The folder above, where pytest finds what tests share.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_run import config_for, small_model, squares

from llava_ray import sweep
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import DatasetRecord, SweepResult
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig

RATES = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2]
KNOWN = {"learning_rate": RATES[-1]}
SEEDS = (0, 1, 2)
STEPS = 27


def config_of(root: Path, seed: int, *overrides: str) -> RunConfig:
    config = config_for(
        root / "store", root / "model", "train.batch_size=4", f"train.max_steps={STEPS}",
        "train.epochs=20", f"train.seed={seed}", f"sweep.seed={seed}", *overrides,
    )  # fmt: skip
    # In rising order each trial would be the best so far, and none would be stopped.
    order = random.Random(seed).sample(RATES, len(RATES))
    space = {"learning_rate": {"grid": order}}
    return config.model_copy(update={"sweep": config.sweep.model_copy(update={"space": space})})


def run_one(root: Path, seed: int, *overrides: str) -> SweepResult:
    """Sweep in this process, on a Ray of its own."""
    import ray

    store = ArtifactStore(str(root / "store"))
    dataset = store.find(DatasetRecord, "dataset-squares")
    assert dataset is not None
    ray.init(address="local", num_cpus=2, dashboard_port=0, object_store_memory=100 * 2**20)
    try:
        return sweep.run(config_of(root, seed, *overrides), dataset)
    finally:
        ray.shutdown()


def in_own_process(root: Path, seed: int, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--sweep", str(root), str(seed), *overrides]
    return subprocess.Popen(command, start_new_session=True)


def last_result(root: Path) -> SweepResult:
    return ArtifactStore(str(root / "store")).find_all(SweepResult)[-1]


def finished_trials(root: Path) -> list[str]:
    """Return the ids of the trials of the unfinished sweep that came to their end."""
    found = []
    for path in root.glob("store/work/*/tune/TrialRun_*/result.json"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["done"]:
            found.append("_".join(path.parent.name.split("_")[1:3]))
    return found


def last_write(root: Path, trial: str) -> float:
    """Return when a trial's training last wrote a file; 0 where its folder is gone."""
    paths = root.glob(f"store/work/*/trials/{trial}-*/**/*")
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def kill_and_go_on(root: Path, seed: int) -> dict[str, Any]:
    """Kill the driver once two trials are done; return what the second run did again."""
    driver = in_own_process(root, seed)
    while len(done := finished_trials(root)) < 2:
        assert driver.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.3)
    killed_at = time.time()
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    # Ray's processes end when they find their driver gone.
    time.sleep(15)
    second = in_own_process(root, seed)
    again = set()
    while second.poll() is None:
        # The folder goes with the sweep's end: look while it is there.
        again |= {trial for trial in done if last_write(root, trial) > killed_at + 5}
        time.sleep(0.3)
    assert second.returncode == 0
    return {"finished_before_kill": len(done), "finished_trials_run_again": len(again)}


def row(result: SweepResult, wall_s: float) -> dict[str, Any]:
    return {
        "best": result.best,
        "found_known_best": result.best == KNOWN,
        "best_eval_loss": round(result.best_value, 4),
        "steps": result.steps,
        "steps_without_asha": result.steps_without_early_stop,
        "share_of_steps": round(result.steps / result.steps_without_early_stop, 3),
        "statuses": sorted(trial.status for trial in result.trials),
        "wall_s": round(wall_s, 1),
    }


def swept(root: Path, seed: int, *overrides: str) -> dict[str, Any]:
    start = time.monotonic()
    assert in_own_process(root, seed, *overrides).wait() == 0
    return row(last_result(root), time.monotonic() - start)


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small_model(root / "model")
        squares(root / "store")
        tree: dict[str, Any] = {
            "code_digest": code_digest("sweep"),
            "learning_rates": RATES,
            "known_best": KNOWN,
            "steps_per_trial": STEPS,
        }
        start = time.monotonic()
        tree["killed"] = kill_and_go_on(root, SEEDS[0])
        tree["seeds"] = {str(SEEDS[0]): row(last_result(root), time.monotonic() - start)}
        for seed in SEEDS[1:]:
            tree["seeds"][str(seed)] = swept(root, seed)
        tree["without_asha"] = swept(root, SEEDS[0], "sweep.scheduler=fifo")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(tree, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--sweep":
        print(run_one(Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]).uri)
    else:
        main(Path(sys.argv[1]))
