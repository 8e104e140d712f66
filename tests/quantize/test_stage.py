"""The stage: parallel Ray tasks, failures apart, finished work found again."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantize_inputs import merged_record
from safetensors import SafetensorError
from tiny_run import squares

from llava_ray import quantize
from llava_ray.artifacts.records import (
    DatasetRecord,
    MergedModel,
    QuantizationRun,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore, verify
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, StorageError, VariantError
from llava_ray.quantize.job import Job
from llava_ray.quantize.none import NoneSpec
from llava_ray.resources.capacity import Resources


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "runs"))


@pytest.fixture
def merged(store: ArtifactStore) -> MergedModel:
    return merged_record(store)


@pytest.fixture
def dataset(store: ArtifactStore) -> DatasetRecord:
    return squares(Path(store.storage.uri), num_train=1, num_test=1)


def configured(store: ArtifactStore, *variants: str) -> RunConfig:
    tree = {
        "storage": {"uri": store.storage.uri},
        "resources": {"node_types": "up"},
        "quantize": {"variants": ("none-fp16", *variants)},
    }
    return RunConfig.model_validate(tree)


@pytest.fixture
def run(
    ray_local: None, store: ArtifactStore, merged: MergedModel, dataset: DatasetRecord
) -> Callable[..., Any]:
    """Return what makes none-fp16 and the variants of further slugs."""
    return lambda *slugs: quantize.run(configured(store, *slugs), merged, dataset)


def patch_task(monkeypatch: pytest.MonkeyPatch, slug: str, instead: Callable[[], None]) -> None:
    """Make the task of one slug do something else in its worker."""
    real = quantize.make_variant

    def patched(job: Job, device: str) -> Variant:
        if job.slug == slug:
            instead()
        return real(job, device)

    monkeypatch.setattr(quantize, "make_variant", patched)


def test_variants_are_made_once_and_timed(
    run: Callable[..., Any],
    merged: MergedModel,
    store: ArtifactStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="llava_ray"):
        made = run("bnb-nf4", "hqq-w4-g64")
    assert [record.slug for record in made] == ["none-fp16", "bnb-nf4", "hqq-w4-g64"]
    for record in made:
        assert isinstance(record, Variant)
        verify(record, Path(record.uri))
        assert record.parents == (merged.id,)
        assert 0 < record.quantize_s <= record.wall_s
        assert record.peak_memory_bytes > 50e6
    assert "3 variants in" in caplog.text
    (timing,) = store.find_all(QuantizationRun)
    assert timing.variant_wall_s == {record.slug: record.wall_s for record in made}
    assert timing.sum_s == pytest.approx(sum(record.wall_s for record in made))
    assert run("bnb-nf4", "hqq-w4-g64") == made


def test_failures_are_recorded_and_tried_again(
    run: Callable[..., Any], store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise VariantError("variant 'bnb-nf4': shapes do not fit")

    with monkeypatch.context() as patch:
        patch_task(patch, "bnb-nf4", fail)
        good, bad = run("bnb-nf4")
    assert isinstance(good, Variant)
    assert bad == VariantFailure(slug="bnb-nf4", reason="variant 'bnb-nf4': shapes do not fit")
    (timing,) = store.find_all(QuantizationRun)
    assert timing.failures == (bad,)
    assert not list((Path(store.storage.uri) / ".staging").iterdir())
    same, now_good = run("bnb-nf4")
    assert same == good
    assert isinstance(now_good, Variant)


def test_a_full_storage_ends_the_stage_not_one_variant(
    run: Callable[..., Any], store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B12"""

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    def fill() -> None:
        monkeypatch.setattr(NoneSpec, "quantize", full)

    patch_task(monkeypatch, "none-bf16", fill)
    with pytest.raises(StorageError, match=f"no space left at {store.storage.uri}"):
        run("none-bf16", "bnb-nf4")


def test_a_programming_error_and_a_killed_worker_stop_no_other(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crash() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def divide() -> None:
        raise ZeroDivisionError("division by zero")

    patch_task(monkeypatch, "none-bf16", divide)
    patch_task(monkeypatch, "bnb-nf4", die)
    patch_task(monkeypatch, "bnb-fp4", crash)
    good, broken, killed, crashed = run("none-bf16", "bnb-nf4", "bnb-fp4")
    assert isinstance(good, Variant)
    assert isinstance(broken, VariantFailure)
    assert broken.reason == "ZeroDivisionError: division by zero"
    assert isinstance(killed, VariantFailure)
    assert killed.reason.startswith("died by SIGKILL: probably the machine ran out of memory")
    assert isinstance(crashed, VariantFailure)
    assert "died by SIGSEGV in crash (test_stage.py:" in crashed.reason
    assert "leave the variant out" in crashed.reason
    stack = Path(crashed.reason.rpartition("(stack: ")[2].rstrip(")"))
    assert "Fatal Python error: Segmentation fault" in stack.read_text()


def test_what_no_node_can_run_fails_instead_of_waiting(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(self: NoneSpec, model_bytes: int, *, gpu: bool) -> Resources:
        return Resources(num_gpus=8 if self.dtype == "fp32" else 0)

    monkeypatch.setattr(NoneSpec, "resources", too_much)
    good, bad = run("none-fp32")
    assert isinstance(good, Variant)
    assert isinstance(bad, VariantFailure)
    assert "asks for 1 CPUs, 8 GPUs: the cluster has no node for that" in bad.reason


def test_an_environment_that_cannot_be_had_is_a_failure(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def out_of_reach() -> None:
        os.environ |= {"LLAVA_RAY_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}

    patch_task(monkeypatch, "awq-w4-g128", out_of_reach)
    good, bad = run("awq-w4-g128")
    assert isinstance(good, Variant)
    assert isinstance(bad, VariantFailure)
    assert bad.reason.startswith("AutoAWQ's environment could not be set up: ERROR: ")
    assert "autoawq==0.2.9" in bad.reason
    assert [path.suffix for path in (tmp_path / "autoawq").iterdir()] == [".lock"]


def test_an_unknown_slug_is_refused_before_any_task(
    store: ArtifactStore, merged: MergedModel, dataset: DatasetRecord
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'hqq-w4-g64'"):
        quantize.run(configured(store, "hqq-w4-g63"), merged, dataset)


def test_only_calibrated_variants_depend_on_the_data(
    store: ArtifactStore, merged: MergedModel, dataset: DatasetRecord
) -> None:
    config = configured(store)
    other = dataset.model_copy(update={"id": "dataset-1"})
    plan = Job.plan
    assert (
        plan(config, "bnb-nf4", merged, dataset).artifact_id
        == plan(config, "bnb-nf4", merged, other).artifact_id
    )
    assert (
        plan(config, "awq-w4-g128", merged, dataset).artifact_id
        != plan(config, "awq-w4-g128", merged, other).artifact_id
    )
