"""Time every method on LLaVA-1.5-7B's shapes, one after another and without Ray.

Weights and pictures are random: they cost the same time and say nothing of quality.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import ArtifactStore, artifact_id
from llava_ray.bench import results
from llava_ray.bench.model import write_model
from llava_ray.models.folder import EMBEDDED, weights_sha256
from llava_ray.models.tensors import Phases
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration
from llava_ray.resources.memory import host_peak_bytes, peak_bytes, reset_peaks

logger = logging.getLogger(__name__)

SLUGS = (
    "hqq-w8-g64", "hqq-w4-g64", "hqq-w2-g64", "bnb-nf4", "bnb-nf4-dq", "bnb-int8", "awq-w4-g128",
)  # fmt: skip
SAMPLES = 32
"""For calibrated methods; the default of quantize.calibration_samples."""


def run(out: Path, work: Path, model: Path | None, slugs: Sequence[str]) -> Path:
    """Measure `slugs` and write a row for each; a failure becomes a row with its reason.

    `model` defaults to 7B shapes, written below `work` once. Raises ConfigError for an unknown
    slug.
    """
    for slug in slugs:
        spec_for(slug)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    merged = model or write_model(work / "model", device)
    calibration = write_calibration(work / "calibration")
    rows: list[dict[str, Any]] = []
    for slug in slugs:
        try:
            row = measure(slug, merged, calibration, work, device)
        except Exception as error:
            logger.exception("%s failed", slug)
            row = {"slug": slug, "failed": f"{type(error).__name__}: {error}"[:300]}
        logger.info("%s", json.dumps(row))
        rows.append(row)
        results.write(out, "quantize_7b", {"calibration_samples": SAMPLES, "rows": rows}, device)
    return out


def measure(
    slug: str, merged: Path, calibration: Calibration, work: Path, device: str
) -> dict[str, Any]:
    """Return seconds and bytes; the embedded model comes first, to load libraries and kernels."""
    spec = spec_for(slug)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        spec.quantize(EMBEDDED, Path(tempfile.mkdtemp(dir=folder)), calibration, device)
        target = Path(tempfile.mkdtemp(dir=folder))
        reset_peaks(device)
        start = time.perf_counter()
        phases = spec.quantize(merged, target, calibration, device) or Phases()
        return {
            "slug": slug,
            "failed": "",
            "total_s": time.perf_counter() - start,
            **asdict(phases),
            "peak_memory_bytes": phases.peak_memory_bytes or peak_bytes(device),
            "host_peak_bytes": host_peak_bytes(),
            "size_bytes": sum(path.stat().st_size for path in target.iterdir()),
            "estimated_bytes": spec.estimated_bytes(merged),
        }


def embedded_variant(store: ArtifactStore, slug: str) -> Variant:
    """Return the embedded model, not fine-tuned, as a variant without calibration."""
    settings = {"slug": slug, "base": weights_sha256(EMBEDDED)}
    name = artifact_id(Variant.kind, settings)
    found = store.find(Variant, name)
    if found is not None:
        return found
    spec = spec_for(slug)
    with store.build(Variant, name, settings=settings) as build:
        spec.quantize(EMBEDDED, build.folder, Calibration(build.folder, 0), "cpu")
        return build.finish(
            Variant, device="cpu", slug=slug, method=spec.method,
            bits_per_weight=spec.bits_per_weight(), quantize_s=0, peak_memory_bytes=0,
        )  # fmt: skip


def write_calibration(folder: Path) -> Calibration:
    """Write random pictures with random captions of some 270 tokens in LLaVA's format."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        pixels = rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        letters = rng.integers(ord("a"), ord("z") + 1, (60, 4), dtype=np.uint8)
        words = " ".join(word.tobytes().decode() for word in letters)
        turns = [("human", "<image>\nDescribe this image in detail."), ("gpt", words)]
        rows.append({
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [{"from": who, "value": text} for who, text in turns],
        })  # fmt: skip
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return Calibration(folder, SAMPLES)
