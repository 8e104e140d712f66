"""The hash of a base model's weights, remembered between stages."""

import os
from pathlib import Path

import pytest

from llava_ray.models import folder as models
from llava_ray.models.folder import weights_sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "a.safetensors").write_bytes(b"first")
    return made


def test_a_file_is_hashed_once(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_sha256(folder)
    monkeypatch.setattr(models, "sha256_of", lambda path: pytest.fail(f"{path} was read again"))
    assert weights_sha256(folder) == first


def test_a_changed_file_is_hashed_anew(cache: Path, folder: Path) -> None:
    first, path = weights_sha256(folder), folder / "a.safetensors"
    before = path.stat().st_mtime_ns
    path.write_bytes(b"other")
    # Two writes within one tick of the file system's clock would have the same time.
    os.utime(path, ns=(before, before + 1_000_000))
    assert weights_sha256(folder) != first


@pytest.mark.parametrize("text", [b"", b"\xff", b"one line"])
def test_a_broken_note_is_replaced(cache: Path, folder: Path, text: bytes) -> None:
    first = weights_sha256(folder)
    (note,) = (cache / "sha256").iterdir()
    note.write_bytes(text)
    assert weights_sha256(folder) == first
    assert note.read_bytes() != text


def test_no_cache_folder_is_no_obstacle(cache: Path, folder: Path) -> None:
    cache.write_text("a file in its place")
    assert weights_sha256(folder) == weights_sha256(folder)
