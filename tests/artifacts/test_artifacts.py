import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from sealed import FIELDS, write

from llava_ray.artifacts import node
from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import DatasetRecord, MergedModel
from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import ArtifactStore, local_folder, read_record, verify
from llava_ray.errors import (
    ArtifactError,
    ConfigError,
    ResourceError,
    StorageError,
    VariantError,
)


def make(store: ArtifactStore, text: str = "hello") -> DatasetRecord:
    with store.build(DatasetRecord, "dataset-1", settings={"seed": 0}) as build:
        (build.folder / "images").mkdir()
        (build.folder / "images" / "a.txt").write_text(text)
        return build.finish(
            DatasetRecord, device="cpu", source="test", num_train=1, num_test=1, rejected={}
        )


@pytest.fixture(params=["local", "remote"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ArtifactStore:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    uri = str(tmp_path / "runs") if request.param == "local" else f"memory://{tmp_path.name}"
    return ArtifactStore(uri)


def test_a_finished_artifact_is_found_again(store: ArtifactStore) -> None:
    assert store.find(DatasetRecord, "dataset-1") is None
    record = make(store)
    assert store.find(DatasetRecord, "dataset-1") == record
    assert read_record(DatasetRecord, record.uri) == record
    assert store.find_all(DatasetRecord) == [record]
    assert record.size_bytes == 5
    assert (local_folder(record) / "images" / "a.txt").read_text() == "hello"


def test_a_failed_build_leaves_nothing(store: ArtifactStore) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        store.build(DatasetRecord, "dataset-1", settings={}) as build,
    ):
        (build.folder / "half").write_text("x")
        raise ZeroDivisionError
    assert store.find(DatasetRecord, "dataset-1") is None
    assert not build.folder.exists()


def test_a_note_beside_an_artifact_is_no_part_of_it(store: ArtifactStore) -> None:
    record = make(store)
    Storage(record.uri).write_text("README.md", "first")
    Storage(record.uri).write_text("README.md", "second")
    assert store.storage.read_text("dataset/dataset-1/README.md") == "second"
    assert store.find(DatasetRecord, "dataset-1") == record
    verify(record, local_folder(record))


def test_a_temporary_root_is_removed_whole(store: ArtifactStore) -> None:
    make(store)
    apart = ArtifactStore(store.storage.join("work/score-1"))
    make(apart)
    apart.storage.remove()
    assert apart.find(DatasetRecord, "dataset-1") is None
    assert store.find(DatasetRecord, "dataset-1") is not None
    apart.storage.remove()


def test_verify_names_the_file_that_changed(tmp_path: Path) -> None:
    record = make(ArtifactStore(str(tmp_path)))
    folder = local_folder(record)
    verify(record, folder)
    (folder / "images" / "a.txt").write_text("hellO")
    with pytest.raises(ArtifactError, match=r"images/a.txt differs"):
        verify(record, folder)
    (folder / "images" / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"images/a.txt is missing"):
        verify(record, folder)


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    record = make(ArtifactStore(str(tmp_path)))
    with pytest.raises(ArtifactError, match="not a MergedModel"):
        read_record(MergedModel, record.uri)


def test_ids_depend_on_settings_and_parents() -> None:
    first = artifact_id("adapter", {"lr": 1e-4}, ["dataset-1"])
    assert first == artifact_id("adapter", {"lr": 1e-4}, ["dataset-1"])
    assert first != artifact_id("adapter", {"lr": 2e-4}, ["dataset-1"])
    assert first != artifact_id("adapter", {"lr": 1e-4}, ["dataset-2"])


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    return ArtifactStore(str(tmp_path / "runs"))


def test_a_damaged_artifact_is_named_before_it_is_used(local: ArtifactStore) -> None:
    """B13"""
    record = make(local)
    path = local_folder(record) / "images" / "a.txt"
    path.write_text("hellO")
    with pytest.raises(ArtifactError, match=r"dataset-1: images/a.txt differs"):
        local_folder(record)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"dataset-1: images/a.txt is missing"):
        local_folder(record)


def test_an_artifact_is_checked_once_on_a_node(
    local: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B13"""
    record, checked = make(local), []
    monkeypatch.setattr(node, "verify", lambda *_: checked.append(1))
    local_folder(record)
    assert not checked, "who made it on this node has hashed it"
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "of another node"))
    local_folder(record)
    local_folder(record)
    assert len(checked) == 1
    os.utime(tmp_path / "runs" / "dataset" / "dataset-1" / "images" / "a.txt")
    local_folder(record)
    assert len(checked) == 2


def test_a_finished_artifact_stays_for_who_reads_it(store: ArtifactStore) -> None:
    """B4"""
    first = make(store, "first")
    folder = local_folder(first)
    with (folder / "images" / "a.txt").open() as reader:
        assert make(store, "second") == first
        assert reader.read() == "first"
    assert store.find(DatasetRecord, "dataset-1") == first


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write"),
        VariantError("awq.py: OSError: [Errno 28] No space left on device: 'x'"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_every_librarys_full_disk_is_a_full_disk(error: Exception) -> None:
    """B12"""
    with pytest.raises(StorageError, match="no space left at /runs"), disk_errors("/runs"):
        raise error


def test_a_full_disk_is_one_line() -> None:
    with (
        pytest.raises(ResourceError, match="no space left at /somewhere"),
        disk_errors("/somewhere"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_was_cut_short_is_a_full_disk() -> None:
    with pytest.raises(ResourceError, match="no space left at /runs"), disk_errors("/runs"):
        raise OSError("196608 requested and 128896 written")


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="storage.uri 'gopherx://a'"):
        Storage("gopherx://a")


@pytest.mark.parametrize("uri", ["s3://", "nope://a/b", "zip://a", "memory://"])
def test_an_odd_storage_is_one_line(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"storage.uri '{uri}") as caught:
        Storage(uri)
    assert "\n" not in str(caught.value)


def test_what_a_dry_run_lists_stays(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "runs"))
    for name in ("dataset-1", "dataset-2"):
        with store.build(DatasetRecord, name, settings={}) as build:
            (build.folder / "x").write_text(name)
            build.finish(
                DatasetRecord, device="cpu", source=name, num_train=1, num_test=1, rejected={}
            )
    command = [sys.executable, "jobs/artifacts.py", f"storage.uri={tmp_path / 'runs'}"]
    home = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    for more in (["--unneeded", "--delete", "--dry-run"], ["--delete"]):
        done = subprocess.run(
            [*command, *more], cwd=home, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(store.everything()) == 2


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    """E6"""
    before = os.umask(0o022)
    try:
        store = ArtifactStore(str(tmp_path))
        with store.build(DatasetRecord, "dataset-9", settings={"seed": 0}) as build:
            write(build.folder, {"a/b.txt": "x"})
            (build.folder / "a" / "b.txt").chmod(0o600)
            record = build.finish(DatasetRecord, **FIELDS)
    finally:
        os.umask(before)
    folder = Path(record.uri)
    modes = [
        oct(path.stat().st_mode & 0o777) for path in (folder, folder / "a", folder / "a/b.txt")
    ]
    assert modes == ["0o755", "0o755", "0o644"]
