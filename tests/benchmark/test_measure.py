"""One engine measured in this process: what is compared is what was asked for."""

import math
from pathlib import Path

import pytest
import torch
from measured_run import SIGNS, make_config, make_dataset, reference
from noisy_engine import NoisyEngine

from llava_ray.artifacts.records import DatasetRecord, ReferenceScores, Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.benchmark.measure import measure_engine, time_engine
from llava_ray.benchmark.plan import Plan, check_room, held_out, make_plan
from llava_ray.benchmark.reference import encode, read_reference, write_reference
from llava_ray.benchmark.timing import PeakMemory, copy_bytes_per_s
from llava_ray.errors import DataError, ResourceError, VariantError
from llava_ray.resources.capacity import Fleet, NodeType, Resources

SMALL = (
    "benchmark.fidelity_samples=3",
    "benchmark.caption_samples=2",
    "benchmark.shown_samples=1",
    "benchmark.decode_tokens=5",
    "benchmark.max_new_tokens=6",
)


def make_fleet(node: Resources) -> Fleet:
    return Fleet((NodeType("node", node),), True, "auto")


def make_small_plan(folder: Path, *overrides: str) -> Plan:
    return make_plan(make_config(folder, *SMALL, *overrides), make_fleet(Resources(2)))


def make_baseline(store: ArtifactStore) -> Variant:
    with store.build(Variant, "variant-base", settings={}) as build:
        return build.finish(
            Variant, device="cpu", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=1, peak_memory_bytes=1,
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> DatasetRecord:
    return make_dataset(ArtifactStore(str(folder)))


@pytest.fixture(scope="module")
def stored(folder: Path, dataset: DatasetRecord) -> ReferenceScores:
    baseline = make_baseline(ArtifactStore(str(folder)))
    return write_reference(NoisyEngine(), make_small_plan(folder), baseline, dataset, "cpu")


def test_reference_holds_each_caption_once_in_order(
    folder: Path, dataset: DatasetRecord, stored: ReferenceScores
) -> None:
    engine, plan = NoisyEngine(), make_small_plan(folder)
    encoded = [
        encode(engine.tokenizer, sample, plan, engine.family)
        for sample in held_out(dataset, stored.num_samples)
    ]
    rows = list(read_reference(stored))
    assert stored.num_samples == len(rows) == len(SIGNS)
    assert stored.num_tokens == sum(len(log_probs) for log_probs, _ in rows)
    for (prompt, caption), (log_probs, top1), words in zip(encoded, rows, SIGNS, strict=True):
        assert engine.tokenizer.decode(caption[:-1]).strip() == reference(words)
        assert caption[-1] == engine.eos_token_id
        assert prompt.input_ids.count(engine.family.vision.image_token_id) == 4
        assert log_probs.dtype == torch.float16 and len(log_probs) == len(top1) == len(caption)


def test_the_baseline_agrees_with_itself(
    folder: Path, dataset: DatasetRecord, stored: ReferenceScores
) -> None:
    engine = NoisyEngine()
    fields, samples = measure_engine(engine, make_small_plan(folder), dataset, stored)
    assert fields["top1_agreement"] == 1
    assert 0 <= fields["kl_divergence"].high < 1e-5
    assert fields["kl_divergence"].repeats == len(samples) == 3
    # A random table knows nothing, so the perplexity is above that of a uniform guess.
    assert fields["perplexity"] > 1024 * 0.8
    assert len(fields["generations"]) == 1
    assert fields["generations"][0].reference == reference(SIGNS[0])
    assert set(fields["scores"]) == {"rouge_l", "cider_d", "word_recall", "character_error_rate"}


def test_more_noise_is_more_divergence_on_the_same_prompts(
    folder: Path, dataset: DatasetRecord, stored: ReferenceScores
) -> None:
    plan, found = make_small_plan(folder), []
    for noise in (0.1, 0.3, 1.0):
        engine = NoisyEngine(noise)
        found.append(measure_engine(engine, plan, dataset, stored)[0])
        scored = engine.seen[-2 - 3 : -2]
        for prompt, sample in zip(scored, held_out(dataset, 3), strict=True):
            expected, _ = encode(engine.tokenizer, sample, plan, engine.family)
            assert prompt.input_ids == expected.input_ids
            assert (prompt.images[0].tiles == expected.images[0].tiles).all()
    divergences = [fields["kl_divergence"].median for fields in found]
    # Two tables add their noise: KL is about half the variance of the noise in the logits.
    assert divergences[0] == pytest.approx(0.1**2, rel=0.25)
    assert divergences == sorted(divergences)
    agreements = [fields["top1_agreement"] for fields in found]
    assert agreements == sorted(agreements, reverse=True) and agreements[-1] < 0.9


def test_another_vocabulary_is_a_failure_of_the_variant(
    folder: Path, dataset: DatasetRecord, stored: ReferenceScores
) -> None:
    engine = NoisyEngine(vocab_size=1100)
    with pytest.raises(VariantError, match="1100.*1024.*vocabularies differ"):
        measure_engine(engine, make_small_plan(folder), dataset, stored)


def test_timing_warms_up_and_repeats(folder: Path, dataset: DatasetRecord) -> None:
    engine = NoisyEngine()
    plan = make_small_plan(folder, "benchmark.warmup=2", "benchmark.repeats=4")
    (sample,) = held_out(dataset, 1)
    prompt, _ = encode(engine.tokenizer, sample, plan, engine.family)
    prefill_s, rate = time_engine(engine, plan, prompt)
    assert len(engine.seen) == 2 + 4
    # Five tokens after the first one: five decodes, whatever the model says.
    assert engine.decoded == 6 * 5
    assert prefill_s.repeats == rate.repeats == 4
    assert 0 < prefill_s.low <= prefill_s.median <= prefill_s.high
    assert 0 < rate.low <= rate.median <= rate.high and math.isfinite(rate.high)


def test_a_caption_that_does_not_fit_says_so(folder: Path, dataset: DatasetRecord) -> None:
    plan = make_small_plan(folder, "train.max_length=8")
    baseline = make_baseline(ArtifactStore(str(folder)))
    with pytest.raises(DataError, match="train.max_length=8"):
        write_reference(NoisyEngine(), plan, baseline, dataset, "cpu")


@pytest.mark.parametrize(
    ("overrides", "node", "device"),
    [
        ((), Resources(2), "cpu"),
        ((), Resources(2, 1), "cuda"),
        (("benchmark.device=cpu",), Resources(2, 1), "cpu"),
    ],
)
def test_device_follows_the_cluster(
    tmp_path: Path, overrides: tuple[str, ...], node: Resources, device: str
) -> None:
    plan = make_plan(make_config(tmp_path, *overrides), make_fleet(node))
    assert (plan.device, plan.resources.num_gpus) == (device, 1 if device == "cuda" else 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark.device=cuda", "asks for 1 CPUs, 1 GPUs: the cluster has no node"),
        ("serve.cpus_per_replica=3", "asks for 3 CPUs: the cluster has no node for that"),
    ],
)
def test_what_the_cluster_lacks_is_said_at_once(
    tmp_path: Path, override: str, message: str
) -> None:
    fleet = make_fleet(Resources(2))
    with pytest.raises(ResourceError, match=message):
        check_room(make_plan(make_config(tmp_path, override), fleet), fleet)


def test_parallelism_is_no_part_of_a_scorecards_id(tmp_path: Path) -> None:
    one, two = (make_small_plan(tmp_path, f"benchmark.max_parallel={n}") for n in (1, 2))
    assert one.settings() == two.settings()
    assert one.settings() != make_small_plan(tmp_path, "serve.cpus_per_replica=2").settings()


def test_memory_and_bandwidth_of_this_machine_are_plausible() -> None:
    assert 50e6 < PeakMemory("cpu").read() < 1e12
    assert 1e8 < copy_bytes_per_s("cpu") < 5e12
