"""One full-precision pair serves all variants that are made at a time, and none is left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_ray.errors import VariantError
from llava_ray.quantize import gguf_source
from llava_ray.quantize.gguf_source import shared_pair


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the writing, which takes long enough for others to come meanwhile."""
    calls: list[str] = []

    def write_pair(merged: Path, text: Path, mmproj: Path, *, precision: str) -> None:
        calls.append(precision)
        text.write_text("half")
        time.sleep(0.2)
        text.write_text(f"text {precision}")
        mmproj.write_text("mmproj")

    monkeypatch.setattr(gguf_source, "write_pair", write_pair)
    return calls


def test_it_is_written_once_and_deleted_by_the_last(
    merged: Path, beside: Path, written: list[str]
) -> None:
    all_hold_it = threading.Barrier(4)

    def use(index: int) -> str:
        with shared_pair(merged, beside, "f16") as (text, mmproj):
            all_hold_it.wait(timeout=30)
            found = text.read_text() + mmproj.read_text()
            time.sleep(0.02 * index)
            assert text.read_text(), "one that left took the pair along"
            return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(4))) == ["text f16mmproj"] * 4
    assert written == ["f16"]
    assert list(beside.iterdir()) == []


def test_coming_and_going_at_any_time_finds_a_whole_pair(
    merged: Path, beside: Path, written: list[str]
) -> None:
    def use(index: int) -> str:
        time.sleep(0.05 * (index % 5))
        with shared_pair(merged, beside, "f16") as (text, _):
            return text.read_text()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(24))) == {"text f16"}
    assert list(beside.iterdir()) == []


def test_precisions_and_changed_weights_are_kept_apart(
    merged: Path, beside: Path, written: list[str]
) -> None:
    with shared_pair(merged, beside, "f16") as first:
        with shared_pair(merged, beside, "f32") as second:
            assert first[0].read_text() != second[0].read_text()
        (merged / "model.safetensors").write_bytes(b"other weights")
        with shared_pair(merged, beside, "f16") as third:
            assert third[0] != first[0]
    assert written == ["f16", "f32", "f16"]


def test_a_failure_leaves_nothing_and_the_next_tries_again(
    merged: Path, beside: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(merged: Path, text: Path, mmproj: Path, *, precision: str) -> None:
        text.write_text("half")
        raise VariantError("no such tensor")

    works = gguf_source.write_pair
    monkeypatch.setattr(gguf_source, "write_pair", fail)
    with pytest.raises(VariantError), shared_pair(merged, beside, "f16"):
        pass
    assert [path for path in beside.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(gguf_source, "write_pair", works)
    with shared_pair(merged, beside, "f16") as (text, _):
        assert text.read_text() == "text f16"
    assert list(beside.iterdir()) == []
