"""Storage on a real S3 server: one download a node, a server that goes away, one-line errors."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, s3_server
from sealed import FIELDS, open_at_once, seal, write
from small_data import write_dataset

from llava_ray.artifacts import faults
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import ArtifactStore, local_folder, read_record
from llava_ray.errors import ConfigError, StorageError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.models.dataset import open_split

_TESTS = Path(__file__).parents[1]
FILES = {"images/a.txt": "hello", **{f"images/{n:03d}.txt": "x" * 100 for n in range(40)}}
_AT_ONCE = """
import sys
from concurrent.futures import ProcessPoolExecutor
from sealed import open_at_once
if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(open_at_once, [sys.argv[1]] * 2, [4] * 2))
    print(sorted(text for texts in found for text in texts))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def uri(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import s3fs

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()  # Its clients keep endpoint and credentials.
    yield f"s3://bucket/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()


def job(uri: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "jobs/prepare.py", f"storage.uri={uri}", "data.limit=4"],
        cwd=_TESTS.parent, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_eight_tasks_of_each_of_two_nodes_make_one_download_a_node(
    server: S3Server, uri: str, tmp_path: Path
) -> None:
    """B4"""
    record = seal(ArtifactStore(uri), FILES)
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(_TESTS)])}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", _AT_ONCE, record.uri], stdout=subprocess.PIPE, text=True,
            env=shared | {"LLAVA_RAY_CACHE": str(tmp_path / f"node{n}")},
        )
        for n in range(2)
    ]  # fmt: skip
    for node in nodes:
        assert node.communicate(timeout=120)[0].strip() == str(["hello"] * 8)
    assert server.counts("GET", f"{tmp_path.name}/dataset/dataset-1/images/a.txt") == 2
    for n in range(2):
        assert len(list((tmp_path / f"node{n}" / "artifacts").iterdir())) == 1
        assert not list(tmp_path.glob(f"node{n}/staging/*"))


def test_the_manifest_appears_last_and_work_goes_when_it_is_there(uri: str) -> None:
    """B4"""
    store = ArtifactStore(uri)
    with store.build(DatasetRecord, "dataset-1", settings={}) as build:
        write(build.folder, FILES)
        store.storage.create_text("work/dataset-1/checkpoint", "x")
        seen: list[set[str]] = []
        put = Storage.create_text

        def create(storage: Storage, relative: str, text: str) -> bool:
            if relative.endswith("manifest.json"):
                seen.append(set(storage.list_files("dataset/dataset-1/images")))
            return put(storage, relative, text)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Storage, "create_text", create)
            build.finish(DatasetRecord, **FIELDS)
    store.remove_work("dataset-1")
    assert seen == [{Path(name).name for name in FILES}]
    assert store.storage.list_folders("work") == []
    assert store.storage.list_files(".leases") == []


def test_a_finished_artifact_is_never_replaced(uri: str) -> None:
    """B4"""
    first = seal(ArtifactStore(uri), {"images/a.txt": "first"})
    second = seal(ArtifactStore(uri), {"images/a.txt": "second"})
    assert second == first
    assert open_at_once(first.uri, 1) == ["first"]


def test_a_damaged_copy_is_downloaded_again(uri: str) -> None:
    """B13"""
    record = seal(ArtifactStore(uri), FILES)
    folder = local_folder(record)
    (folder / "images" / "a.txt").write_text("HELLO", encoding="utf-8")
    assert (local_folder(record) / "images" / "a.txt").read_text("utf-8") == "hello"


def test_two_storages_have_two_copies(uri: str) -> None:
    first = seal(ArtifactStore(f"{uri}/1"), {"images/a.txt": "first"})
    second = seal(ArtifactStore(f"{uri}/2"), {"images/a.txt": "second"})
    assert open_at_once(first.uri, 1) + open_at_once(second.uri, 1) == ["first", "second"]


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_rows_are_read_by_range_unless_the_node_may_keep_them(
    uri: str, tmp_path: Path, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C12"""
    picture = bytes(300_000)
    rows = [
        Sample(
            str(i), (f"{i}.jpg",), (Turn("What?", 1, "A sign."),), pictures=(b"%d" % i + picture,)
        )
        for i in range(6)
    ]
    with ArtifactStore(uri).build(DatasetRecord, "dataset-1", settings={}) as build:
        write_dataset(build.folder, rows)
        record = build.finish(DatasetRecord, **FIELDS)
    split = open_split(record, "train", cache_bytes=cache_bytes)
    sizes, read_range = list[int](), Storage.read_range

    def counted(self: Storage, *arguments: Any) -> bytes:
        sizes.append(len(found := read_range(self, *arguments)))
        return found

    monkeypatch.setattr(Storage, "read_range", counted)
    assert pickle.loads(pickle.dumps(split)).read(4) == rows[4]
    assert 300_001 < sum(sizes) == split.num_bytes[4] < 300_500
    kept = [path for path in (tmp_path / "cache").rglob("*.tar")]
    assert len(kept) == bool(cache_bytes)


_SLOW = pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1")


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=[pytest.mark.slow, _SLOW])])
def test_a_server_that_was_gone_for_a_while_is_waited_for(
    server: S3Server, uri: str, tmp_path: Path, seconds: int
) -> None:
    """B10"""
    store = ArtifactStore(uri)
    with store.build(DatasetRecord, "dataset-1", settings={}) as build:
        write(build.folder, FILES)
        threading.Thread(target=server.gone, args=(seconds,)).start()
        time.sleep(0.5)
        record = build.finish(DatasetRecord, **FIELDS)
    gone = threading.Thread(target=server.gone, args=(seconds,))
    gone.start()
    time.sleep(0.5)
    assert local_folder(read_record(DatasetRecord, record.uri)).is_dir()
    gone.join()


def test_a_server_that_stays_away_is_one_line_and_a_node_needs_it_no_more(
    server: S3Server, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B10, B16"""
    record = seal(ArtifactStore(uri), FILES)
    local_folder(read_record(DatasetRecord, record.uri, cached=True))
    monkeypatch.setattr(faults, "GONE_S", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    Storage(uri)._fs.clear_instance_cache()
    with pytest.raises(StorageError, match=rf"{uri} does not answer for \d+ s .*node reaches it"):
        ArtifactStore(uri).find(DatasetRecord, "dataset-1")
    assert local_folder(read_record(DatasetRecord, record.uri, cached=True)).is_dir()


def test_a_missing_bucket_is_one_line_and_is_not_made(server: S3Server, uri: str) -> None:
    """B16"""
    done = job("s3://nobucket/run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: storage.uri 's3://nobucket/run': there is no such bucket"
    )
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="no such bucket"):
        seal(ArtifactStore("s3://nobucket/run"), FILES)
    with pytest.raises(ConfigError, match="no such bucket"):
        Storage("s3://nobucket/run").check()


def test_missing_credentials_are_one_line(uri: str, tmp_path: Path) -> None:
    """B16"""
    done = job(uri, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "no credentials on this node" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_dead_download_is_begun_anew(uri: str) -> None:
    """B14"""
    record = seal(ArtifactStore(uri), FILES)
    folder = local_folder(record)
    part = folder.with_name(f".{folder.name}")
    shutil.copytree(folder, part)
    (part / "stray").write_text("x")
    shutil.rmtree(folder)
    assert not (local_folder(record) / "stray").exists()
    assert not part.exists()
