"""Timings have their machine to themselves."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from llava_ray.benchmark.turns import quiet_turn, shared_turn


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_work_goes_side_by_side_but_never_beside_a_timing() -> None:
    events: list[str] = []

    def take(turn: Callable[[], AbstractContextManager[None]], name: str) -> threading.Thread:
        def work() -> None:
            with turn():
                events.append(f"{name} begins")
                time.sleep(0.3)
                events.append(f"{name} ends")

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        return thread

    threads = [
        take(shared_turn, "first"),
        take(shared_turn, "second"),
        take(quiet_turn, "timing"),
        # It came last, so it waits for the timing that waits for the first two.
        take(shared_turn, "third"),
    ]
    for thread in threads:
        thread.join()
    assert events == [
        "first begins", "second begins", "first ends", "second ends",
        "timing begins", "timing ends", "third begins", "third ends",
    ]  # fmt: skip


def test_a_process_that_fails_gives_its_turn_back() -> None:
    with pytest.raises(ZeroDivisionError), quiet_turn():
        _ = 1 / 0
    with shared_turn(), shared_turn():
        pass
