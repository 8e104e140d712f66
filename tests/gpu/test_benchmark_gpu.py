"""The benchmark stage on a GPU: bandwidth, memory and a measured variant."""

import shutil
from pathlib import Path

import pytest
import torch
from measured_run import make_config, make_dataset

from llava_ray import benchmark
from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.benchmark.timing import PeakMemory, copy_bytes_per_s
from llava_ray.models.folder import EMBEDDED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_peak_memory_counts_what_is_freed_again() -> None:
    memory = PeakMemory("cuda")
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block
    assert 2**28 <= memory.read() < 2**28 + 2**30


def test_a_copy_is_faster_than_any_cpu_and_slower_than_any_gpu_to_come() -> None:
    assert 1e11 < copy_bytes_per_s("cuda") < 2e13


@pytest.mark.usefixtures("ray_local")
def test_a_variant_is_measured_on_a_gpu_of_its_own(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    dataset = make_dataset(store)
    with store.build(Variant, "variant-none-fp16", settings={}) as build:
        shutil.copytree(EMBEDDED, build.folder, dirs_exist_ok=True)
        variant = build.finish(
            Variant, device="cpu", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=1, peak_memory_bytes=1,
        )  # fmt: skip
    config = make_config(
        tmp_path, "benchmark.fidelity_samples=2", "benchmark.caption_samples=2",
        "benchmark.max_new_tokens=8", "benchmark.decode_tokens=8",
    )  # fmt: skip
    (card,) = benchmark.run(config, [variant], dataset)
    assert isinstance(card, Scorecard)
    assert card.device == torch.cuda.get_device_name()
    assert card.top1_agreement > 0.98 and card.kl_divergence.high < 1e-3
    assert variant.size_bytes / 2 < card.memory_bytes < 4e9
    assert 0 < card.bandwidth_share < 1
