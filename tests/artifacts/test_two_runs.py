"""Two equal trainings at once on one storage, each a driver with a Ray of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_run import small_model

_HOME = Path(__file__).parents[2]
_SETTINGS = (
    "data.limit=12", "train.max_steps=60", "train.num_workers=1", "train.cpus_per_worker=1",
    "train.lora_r=4", "train.lora_alpha=8", "train.checkpoint_every_steps=1",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]


class Run:
    """A driver and its log."""

    def __init__(self, storage: Path, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "jobs/train.py", f"storage.uri={storage}", f"model.path={model}",
             *_SETTINGS],
            cwd=_HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_HOME), *sys.path])},
        )  # fmt: skip
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait(self) -> int:
        code = self._process.wait(240)
        self._reader.join()
        return code

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log += line


@pytest.mark.parametrize("killed", [False, True])
def test_the_second_waits_and_finds_it_or_goes_on_where_the_first_died(
    tmp_path: Path, killed: bool
) -> None:
    """B11"""
    model, storage = small_model(tmp_path / "model"), tmp_path / "runs"
    first = Run(storage, model)
    try:
        deadline = time.monotonic() + 120
        while not list(storage.glob("work/adapter-*/checkpoints/checkpoint_*/state.json")):
            assert time.monotonic() < deadline, first.log
            time.sleep(0.05)
        second = Run(storage, model)
        try:
            while "waits for who makes it, process" not in second.log:
                assert time.monotonic() < deadline, second.log
                time.sleep(0.05)
            if killed:
                first.kill()
            assert second.wait() == 0, second.log
        finally:
            second.kill()
    finally:
        first.kill()
    assert ("train: resumed at step" in second.log) == killed
    assert len(list(storage.glob("adapter/*"))) == 1
    assert not list(storage.glob("work/*")) and not list(storage.glob(".staging/*"))
