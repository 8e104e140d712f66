"""The stage on Ray: a process per variant, failures kept apart, finished work found."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from measured_run import make_config, make_dataset

from llava_ray import benchmark
from llava_ray.artifacts.records import (
    DatasetRecord,
    Record,
    ReferenceScores,
    Scorecard,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.benchmark import measure
from llava_ray.benchmark.plan import Plan
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.folder import EMBEDDED
from llava_ray.resources.devices import device_name

FAILED = VariantFailure(slug="awq-w4-g128", reason="quantize: no package")


def make_variant(store: ArtifactStore, slug: str, *, whole: bool = True) -> Variant:
    with store.build(Variant, f"variant-{slug}", settings={}) as build:
        if whole:
            shutil.copytree(EMBEDDED, build.folder, dirs_exist_ok=True)
        return build.finish(
            Variant, device="cpu", slug=slug, method=slug.partition("-")[0], bits_per_weight=16,
            quantize_s=1, peak_memory_bytes=1,
        )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(
        tmp_path, "benchmark.fidelity_samples=2", "benchmark.caption_samples=2",
        "benchmark.max_new_tokens=4", "benchmark.decode_tokens=4", "benchmark.repeats=2",
        "benchmark.device=cpu", "benchmark.max_parallel=2",
    )  # fmt: skip


@pytest.mark.usefixtures("ray_local")
def test_each_variant_is_measured_or_fails_on_its_own(config: RunConfig) -> None:
    store = ArtifactStore(config.storage.uri)
    dataset = make_dataset(store)
    variants = [
        make_variant(store, "none-fp16"),
        FAILED,
        make_variant(store, "none-bf16", whole=False),
    ]
    card, failed, broken = benchmark.run(config, variants, dataset)

    assert isinstance(card, Scorecard) and card.slug == "none-fp16"
    assert card.top1_agreement == 1 and card.kl_divergence.high < 1e-5
    assert card.variant_bytes == variants[0].size_bytes
    # A process of its own: neither this one's memory nor that of the bandwidth test.
    assert 100e6 < card.memory_bytes < 3e9
    assert 0 < card.bandwidth_share < 10
    assert card.wall_s > card.load_s > 0
    assert failed == FAILED
    assert isinstance(broken, VariantFailure) and broken.slug == "none-bf16"
    assert broken.reason.startswith("benchmark: ") and "\n" not in broken.reason

    (reference,) = store.find_all(ReferenceScores)
    assert card.parents == (variants[0].id, dataset.id, reference.id)
    assert benchmark.run(config, variants[:1], dataset) == [card]


def copied(store: ArtifactStore, card: Scorecard, device_name: str) -> Scorecard:
    """Seal a scorecard again, as if another device had measured it."""
    settings = {**card.settings, "device_name": device_name}
    made = card.model_dump(exclude=set(Record.model_fields) - {"device"})
    id = f"{card.id.rpartition('-')[0]}-000000"
    with store.build(Scorecard, id, settings=settings, parents=card.parents) as build:
        return build.finish(Scorecard, **made)


@pytest.mark.usefixtures("ray_local")
def test_another_device_measures_anew_and_a_name_decides_among_several(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B3"""
    store = ArtifactStore(config.storage.uri)
    dataset, variants = make_dataset(store), [make_variant(store, "none-fp16")]

    def run(wanted: str = "cpu", node_types: str | None = None) -> Any:
        sections = {"benchmark": {"device": wanted}, "resources": {"node_types": node_types}}
        (card,) = benchmark.run(changed(config, **sections), variants, dataset)
        return card

    ours = run()
    assert ours.device_name == device_name("cpu") and run(ours.device_name[:3]) == ours
    other = copied(store, ours, "Graviton3")
    assert run(node_types="up") == ours and run("graviton") == other
    with pytest.raises(
        ConfigError, match=r"none-fp16 was measured on .*Graviton3.*: set benchmark"
    ):
        run()
    # Where it is not known which node will come, what there is counts; else today's is measured.
    store.delete([ours])
    assert run() == other
    anew = run(node_types="up")
    assert anew.id == ours.id and anew.created >= ours.created
    lack = f"this node has {ours.device_name}, and benchmark.device is 'Xeon 9'"
    assert lack in run("Xeon 9").reason


@pytest.mark.usefixtures("ray_local")
def test_a_native_crash_is_one_line_and_stays_with_its_variant(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = measure.measure

    def crashing(plan: Plan, variant: Variant, *others: Any) -> Scorecard:
        if variant.slug == "none-bf16":
            os.kill(os.getpid(), signal.SIGABRT)
        return real(plan, variant, *others)

    monkeypatch.setattr(measure, "measure", crashing)
    store = ArtifactStore(config.storage.uri)
    variants = [make_variant(store, slug) for slug in ("none-fp16", "none-bf16")]
    card, crashed = benchmark.run(config, variants, make_dataset(store))
    assert isinstance(card, Scorecard)
    assert isinstance(crashed, VariantFailure)
    assert crashed.reason.startswith("benchmark: died by SIGABRT in crashing (test_run.py:")
    assert "(stack: " in crashed.reason and "\n" not in crashed.reason
    assert "Traceback" not in caplog.text


def test_a_failed_baseline_ends_the_stage_with_its_reason() -> None:
    config = RunConfig()
    failed = VariantFailure(slug="none-fp16", reason="disk full")
    with pytest.raises(VariantError, match="baseline 'none-fp16' failed.*disk full"):
        benchmark.find_baseline(config, [failed])
    with pytest.raises(VariantError, match="add it to quantize.variants"):
        benchmark.find_baseline(config, [FAILED])


def test_nothing_held_out_is_said_before_any_work(tmp_path: Path) -> None:
    dataset = make_dataset(ArtifactStore(str(tmp_path))).model_copy(update={"num_test": 0})
    assert isinstance(dataset, DatasetRecord)
    with pytest.raises(ConfigError, match="data.test_share leaves none"):
        benchmark.run(make_config(tmp_path), [], dataset)
