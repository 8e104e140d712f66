"""Work in a forked child: its result, its errors, how it died, and that it dies with its caller."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from llava_ray.errors import DataError, ResourceError
from llava_ray.resources.forked import Forked, run_forked


def test_the_result_comes_back_from_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_forked("first", os.getpid)
    monkeypatch.setenv("SET_AFTER_THE_SERVER_STARTED", "seen")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def work(factor: int) -> tuple[int, str, int]:
        import torch

        return (
            factor * os.getpid(),
            os.environ["SET_AFTER_THE_SERVER_STARTED"],
            (torch.get_num_threads()),
        )

    product, seen, threads = run_forked("second", work, 2)
    assert product % 2 == 0 and product != 2 * os.getpid()
    assert (seen, threads) == ("seen", 1)


def test_an_error_is_raised_as_it_was_with_its_traceback() -> None:
    def fail() -> None:
        raise DataError("row 3: no caption")

    with pytest.raises(DataError, match=r"^row 3: no caption\n") as caught:
        run_forked("failing", fail)
    assert "in fail" in "".join(caught.value.__notes__)


def test_what_cannot_be_sent_back_is_an_error_of_its_own() -> None:
    def unsendable() -> object:
        return (value for value in ())

    with pytest.raises(RuntimeError, match="^generator: "):
        run_forked("unsendable", unsendable)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGSEGV, r"^died by SIGSEGV in die \(test_forked\.py:\d+\): .*\(stack: "),
        (signal.SIGKILL, "^died by SIGKILL: probably the machine ran out of memory"),
    ],
)
def test_a_death_is_one_line(number: signal.Signals, told: str) -> None:
    def die() -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(ResourceError, match=told) as caught:
        run_forked(f"dying {number}", die)
    assert "\n" not in str(caught.value)


def test_leaving_ends_the_child() -> None:
    with Forked("sleeping", time.sleep, 600) as child:
        process = psutil.Process(child._process.pid)
        assert process.is_running()
    assert not process.is_running()


def test_leaving_ends_the_programs_that_it_started(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    def work() -> None:
        subprocess.run(["sh", "-c", f"echo $$ > {told}.draft; mv {told}.draft {told}; sleep 600"])

    with Forked("starting", work):
        deadline = time.monotonic() + 20
        while not told.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        grandchild = psutil.Process(int(told.read_text()))
    grandchild.wait(10)


def test_a_child_dies_with_its_caller(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from llava_ray.resources.forked import Forked

        if __name__ == "__main__":
            child = Forked("orphan", time.sleep, 600)
            print(child._process.pid, flush=True)
            time.sleep(600)
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        process = psutil.Process(int(caller.stdout.readline()))
        caller.kill()
        deadline = time.monotonic() + 20
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)
