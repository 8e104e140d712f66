"""One run at a time makes an artifact; what the dead leave is taken over or removed."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sealed import FIELDS, seal, write

from llava_ray.artifacts import lease, staging
from llava_ray.artifacts.owner import Owner
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ArtifactError

_HOLD = """
import sys, time
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
with ArtifactStore(sys.argv[1]).build(DatasetRecord, "dataset-1", settings={}) as build:
    (build.folder / "half").write_text("x")
    print("holds", flush=True)
    time.sleep(60)
"""
ELSEWHERE = Owner(host="elsewhere", machine="another", pid=1, started=0)


@pytest.fixture(params=["local", "remote"])
def uri(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    uri = str(tmp_path / "runs") if request.param == "local" else f"memory://{tmp_path.name}"
    yield uri
    assert Storage(uri).list_files(".leases") == []


def held_elsewhere(uri: str, count: int = 0) -> None:
    holder = lease._Holder(owner=ELSEWHERE, since="2026-01-01T00:00:00", count=count)
    storage = Storage(uri)
    storage.create_text(".leases/dataset-1.000007", "")
    storage.write_text(".leases/dataset-1.000007", holder.model_dump_json())


def test_of_several_at_once_one_makes_it_and_the_others_find_it(uri: str) -> None:
    """B11"""
    made = []

    def make(number: int) -> DatasetRecord:
        with ArtifactStore(uri).build(DatasetRecord, "dataset-1", settings={}) as build:
            if build.found:
                return build.found
            made.append(number)
            time.sleep(0.2)
            write(build.folder, {"a.txt": str(number)})
            return build.finish(DatasetRecord, **FIELDS)

    with ThreadPoolExecutor(6) as pool:
        records = list(pool.map(make, range(6)))
    assert len(made) == 1
    assert all(record == records[0] for record in records)


def test_a_living_owner_elsewhere_is_waited_for_and_named(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """B11"""
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.02):
            held_elsewhere(uri, count := count + 1)
        Storage(uri).remove(".leases/dataset-1.000007")

    held_elsewhere(uri)
    thread = threading.Thread(target=beat)
    with caplog.at_level(logging.INFO):
        thread.start()
        threading.Timer(2.0, over.set).start()
        start = time.monotonic()
        seal(ArtifactStore(uri), {"a.txt": "x"})
    thread.join()
    assert time.monotonic() - start > 1.9
    assert "waits for who makes it, process 1 on elsewhere, since 2026-01-01" in caplog.text


def test_an_owner_elsewhere_that_shows_no_life_is_replaced(uri: str) -> None:
    """B11"""
    held_elsewhere(uri)
    start = time.monotonic()
    assert seal(ArtifactStore(uri), {"a.txt": "x"}).size_bytes == 1
    assert time.monotonic() - start > lease.STILL_LOOKS * lease.BEAT_S * 0.9


def test_who_was_taken_for_dead_seals_nothing(uri: str) -> None:
    """B11"""
    store = ArtifactStore(uri)
    with (
        pytest.raises(ArtifactError, match=r"dataset-1: process 1 on elsewhere took over"),
        store.build(DatasetRecord, "dataset-1", settings={}) as build,
    ):
        held_elsewhere(uri)
        time.sleep(0.2)
        assert store.storage.list_files(".leases")[-1] == "dataset-1.000007"
        build.finish(DatasetRecord, **FIELDS)
    assert store.find(DatasetRecord, "dataset-1") is None
    store.storage.remove(".leases/dataset-1.000007")


def test_who_died_on_this_machine_is_replaced_at_once_and_its_folder_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B11, B14"""
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        assert len(list(tmp_path.glob(".staging/*/files/half"))) == 1
        process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    seal(ArtifactStore(str(tmp_path)), {"a.txt": "x"})
    assert time.monotonic() - start < lease.BEAT_S
    assert not list((tmp_path / ".staging").iterdir())


def test_a_folder_of_another_machine_is_removed_after_a_day_without_a_sign_of_life(
    tmp_path: Path,
) -> None:
    """B14"""
    storage = Storage(str(tmp_path))
    folders = [staging.Staging(storage, f"dataset-{n}").files.parent for n in range(3)]
    for folder in folders[1:]:
        (folder / "owner.json").write_text(ELSEWHERE.model_dump_json(), encoding="utf-8")
    os.utime(folders[2] / "owner.json", (0, time.time() - 25 * 3600))
    (tmp_path / ".staging" / "of-an-older-version").mkdir()
    os.utime(tmp_path / ".staging" / "of-an-older-version", (0, 0))
    staging.remove_dead(storage)
    assert sorted((tmp_path / ".staging").iterdir()) == sorted(folders[:2])
