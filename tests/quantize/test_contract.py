"""What every quantization method must keep, so that a new one is tested for nothing."""

import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from quantize_inputs import TINY, engine_logits, kl_divergence, merged_record, quantized

from llava_ray import quantize
from llava_ray.artifacts.records import DatasetRecord, Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.quantize.registry import METHODS, known_slugs, spec_for

# By slug the largest KL divergence from the unquantized model, in nats per token.
LARGEST_KL = {
    "none-fp16": 1e-6,
    "none-bf16": 0.01,
    "bnb-int8": 0.02,
    "bnb-nf4": 0.2,
    "hqq-w8-g64": 0.01,
    "hqq-w4-g64": 0.2,
    "gguf-q8_0": 0.02,
    "gguf-q4_k_m": 0.2,
}
CALIBRATED = {"awq-w4-g128": 0.2}
_BOUND = {spec_for(slug).method for slug in {**LARGEST_KL, **CALIBRATED}}
# A new method is tested too, against a bound that any sensible rounding keeps.
LARGEST_KL |= {each.known_slugs[0]: 0.5 for each in METHODS if each.method not in _BOUND}
# GGUF leaves out the CLIP layers that LLaVA never reads: one of seven here, one of 24 in 7B.
SIZE_TOLERANCE = {"gguf": 0.11}
WEIGHT_FILES = {".safetensors", ".gguf"}
OTHER_FILES = {".json", ".jinja", ".model", ".md"}


@cache
def reference() -> torch.Tensor:
    import tempfile

    spec = spec_for("none-fp32")
    with tempfile.TemporaryDirectory() as folder:
        out = quantized(spec, Path(folder) / "out")
        return engine_logits(spec.open_engine(out, device="cpu", slots=1, context=512))


def check(slug: str, folder: Path, largest_kl: float) -> None:
    """Check files, size and fidelity of a variant's folder."""
    spec = spec_for(slug)
    files = [path for path in folder.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert suffixes <= WEIGHT_FILES | OTHER_FILES, f"{suffixes}: pickles are not written"
    assert suffixes & WEIGHT_FILES
    size = sum(path.stat().st_size for path in files)
    assert spec.estimated_bytes(TINY) == pytest.approx(
        size, rel=SIZE_TOLERANCE.get(spec.method, 0.02)
    )
    engine = spec.open_engine(folder, device="cpu", slots=1, context=512)
    logits = engine_logits(engine)
    engine.close()
    assert logits.shape == reference().shape
    distance = kl_divergence(reference(), logits)
    assert -1e-6 < distance < largest_kl, f"{slug}: {distance} nats per token"


@pytest.mark.parametrize("slug", known_slugs())
def test_a_known_slug_is_taken_by_one_method(slug: str) -> None:
    takers = [method for method in METHODS if method.parse(slug) is not None]
    assert len(takers) == 1
    spec = spec_for(slug)
    assert spec.slug == slug
    assert 0.5 < spec.bits_per_weight() <= 34
    for gpu in (False, True):
        need = spec.resources(14 * 10**9, gpu=gpu)
        assert need.num_cpus >= 1
        assert need.memory_bytes > 0
        assert gpu or need.num_gpus == 0


def test_the_default_variants_are_known() -> None:
    wanted = {*RunConfig().quantize.variants, "gguf-q2_k", "gguf-f16", "gguf-iq4_xs"}
    assert wanted <= set(known_slugs())


@pytest.mark.parametrize(
    "slug",
    ["awq", "awq-w3-g128", "awq-w4-g16", "awq-w4-g128-text-sym",
     "bnb", "nf4", "bnb-nf4-", "bnb-nf5", "bnb-int8-dq",
     "gguf-", "gguf-q4", "q4_k_m", "gguf-guessed", "iq2_xxs", "gguf-iq2_xxs-imatrix",
     "gguf-f16-imatrix"],
)  # fmt: skip
def test_other_slugs_are_not_taken(slug: str) -> None:
    with pytest.raises(ConfigError, match="unknown variant"):
        spec_for(slug)


@pytest.mark.parametrize(
    ("slug", "bits"),
    [("bnb-int8", 8), ("bnb-nf4", 4.5), ("bnb-fp4", 4.5), ("bnb-nf4-dq", 4.126953125),
     ("hqq-w8-g64", 8.5), ("hqq-w3-g64", 3.7), ("hqq-w2-g16", 4), ("hqq-w1-g256", 1.125)],
)  # fmt: skip
def test_bits_per_weight_count_scale_and_zero_point(slug: str, bits: float) -> None:
    assert spec_for(slug).bits_per_weight() == pytest.approx(bits)


@pytest.mark.parametrize("slug", LARGEST_KL)
def test_a_variant_is_small_close_and_the_same_again(slug: str, tmp_path: Path) -> None:
    spec = spec_for(slug)
    folder = quantized(spec, tmp_path / "out")
    again = quantized(spec, tmp_path / "again")
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == names
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    shutil.rmtree(again)
    check(slug, folder, LARGEST_KL[slug])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("LLAVA_RAY_SLOW") != "1",
    reason="installs AutoAWQ from the package index; set LLAVA_RAY_SLOW=1",
)
@pytest.mark.parametrize("slug", CALIBRATED)
def test_a_calibrated_variant_is_made_in_its_environment(
    slug: str, ray_local: None, tmp_path: Path
) -> None:
    from llava_ray import prepare

    tree = {
        "storage": {"uri": str(tmp_path)},
        "data": {"limit": 12},
        "quantize": {"variants": ("none-fp16", slug), "calibration_samples": 4},
    }
    config = RunConfig.model_validate(tree)
    dataset: DatasetRecord = prepare.run(config)
    store = ArtifactStore(config.storage.uri)
    _, made = quantize.run(config, merged_record(store), dataset)
    assert isinstance(made, Variant), made
    folder = Path(made.uri)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    check(slug, folder, CALIBRATED[slug])
