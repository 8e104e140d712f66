"""Time every method on LLaVA-1.5-7B's shapes, one after another and without Ray.

Weights and pictures are random: they cost the same time and say nothing of quality. Methods with
versions of their own (AWQ) are measured by a second call, whose rows join those of the first.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_ray.models import tensors as llava_folder
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import known_slugs, spec_for
from llava_ray.quantize.spec import Calibration
from llava_ray.report import article
from llava_ray.resources.devices import device_name
from llava_ray.resources.memory import host_peak_bytes, peak_bytes, reset_peaks

logger = logging.getLogger(__name__)

SLUGS = (
    "hqq-w8-g64", "hqq-w4-g64", "hqq-w2-g64", "bnb-nf4", "bnb-nf4-dq", "bnb-int8", "awq-w4-g128",
)  # fmt: skip
SAMPLES = 32
"""For calibrated methods; the default of quantize.calibration_samples."""
WORDS = 60
"""Of a caption: some 270 tokens beside an image's 576."""


@dataclass(frozen=True)
class Row:
    """One method's time, memory and size; zeros where it failed."""

    slug: str
    status: str
    """`ok`, or `failed` with the reason."""
    reason: str = ""
    device: str = ""
    torch: str = ""
    total_s: float = 0.0
    read_s: float = 0.0
    quantize_s: float = 0.0
    write_s: float = 0.0
    first_use_s: float = 0.0
    """Before: the same method on the embedded model, to import libraries and load kernels."""
    device_peak_bytes: int = 0
    """Allocated on the GPU; the same as `host_peak_bytes` without one."""
    host_peak_bytes: int = 0
    size_bytes: int = 0
    estimated_bytes: int = 0
    article_size_gb: float | None = None


def run(out: Path, work: Path, model: Path | None, slugs: Sequence[str]) -> str:
    """Measure `slugs` and write the rows as JSON, keeping those of other slugs that lie there.

    `model` defaults to 7B shapes, written below `work` once. Returns the table as text. Raises
    ConfigError for an unknown slug.
    """
    for slug in slugs:
        spec_for(slug)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    merged = model or write_model(work / "model", device)
    calibration = write_calibration(work / "calibration", SAMPLES)
    rows = _earlier_rows(out)
    for slug in slugs:
        rows[slug] = measure(slug, merged, calibration, work, device)
        logger.info("%s", rows[slug])
        _save(out, merged, list(rows.values()))
    return table(list(rows.values()))


def measure(slug: str, merged: Path, calibration: Calibration, work: Path, device: str) -> Row:
    """Quantize once to get ready and once for the clock; a failure becomes a row."""
    where: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
    }
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            start = time.perf_counter()
            ready = Path(folder) / "embedded"
            ready.mkdir()
            spec_for(slug).quantize(EMBEDDED, ready, calibration, device)
            first_use_s = time.perf_counter() - start
            target = Path(folder) / slug
            target.mkdir()
            return Row(
                slug, "ok", **where, first_use_s=round(first_use_s, 2),
                **_timed(slug, merged, target, calibration, device),
            )  # fmt: skip
    except Exception as error:
        logger.exception("%s failed", slug)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Row(slug, "failed", reason, **where)


def _timed(
    slug: str, merged: Path, out: Path, calibration: Calibration, device: str
) -> dict[str, Any]:
    spec = spec_for(slug)
    reset_peaks(device)
    start = time.perf_counter()
    phases = spec.quantize(merged, out, calibration, device)
    total_s = time.perf_counter() - start
    parts = asdict(phases) if phases else {"quantize_s": total_s}
    peak = parts.pop("peak_memory_bytes", None)
    return {
        "total_s": round(total_s, 2),
        **{name: round(seconds, 2) for name, seconds in parts.items()},
        "device_peak_bytes": peak or peak_bytes(device),
        "host_peak_bytes": host_peak_bytes(),
        "size_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "estimated_bytes": spec.estimated_bytes(merged),
        "article_size_gb": article.TABLE.get(slug, (None,))[0],
    }


def write_model(folder: Path, device: str) -> Path:
    """Write LLaVA-1.5-7B's shapes in fp16 with the embedded model's tokenizer, unless there."""
    if (folder / "config.json").is_file():
        return folder
    from llava_ray.bench.model import build_model

    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(device, torch.float16)
    writer = llava_folder.ShardWriter(folder)
    for name, value in model.state_dict().items():
        writer.add({name: value})
    writer.finish()
    llava_folder.copy_sidecars(EMBEDDED, folder)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    own = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    tree.pop("image_token_id", None)
    tree |= {"image_token_index": own["image_token_index"], "dtype": "float16"}
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def write_calibration(folder: Path, count: int) -> Calibration:
    """Write random pictures with random captions in LLaVA's format."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pixels = rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        letters = rng.integers(ord("a"), ord("z") + 1, (WORDS, 4))
        words = " ".join("".join(map(chr, word)) for word in letters)
        turns = [("human", "<image>\nDescribe this image in detail."), ("gpt", words)]
        rows.append({
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [{"from": who, "value": text} for who, text in turns],
        })  # fmt: skip
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return Calibration(folder, count)


def table(rows: Sequence[Row]) -> str:
    """Write the rows as Markdown, sizes in GB."""
    lines = [
        "| variant | total s | read s | quantize s | write s | GPU peak | size | estimate "
        "| article | |",
        "| --- |" + " ---: |" * 8 + " --- |",
    ]
    for row in rows:
        seconds = (row.total_s, row.read_s, row.quantize_s, row.write_s)
        sizes = (row.device_peak_bytes, row.size_bytes, row.estimated_bytes)
        cells = [f"{value:.1f}" for value in seconds] + [f"{size / 1e9:.2f}" for size in sizes]
        cells.append("" if row.article_size_gb is None else f"{row.article_size_gb:.2f}")
        lines.append(f"| {row.slug} | {' | '.join(cells)} | {row.reason or row.status} |")
    return "\n".join(lines)


def _earlier_rows(out: Path) -> dict[str, Row]:
    if not out.is_file():
        return {}
    tree = json.loads(out.read_text(encoding="utf-8"))
    return {row["slug"]: Row(**row) for row in tree["rows"]}


def _save(out: Path, merged: Path, rows: list[Row]) -> None:
    tree = {
        "model_bytes": sum(path.stat().st_size for path in merged.glob("*.safetensors")),
        "model_tensors": len(llava_folder.weight_shapes(merged)),
        "calibration_samples": SAMPLES,
        "estimated_bytes": {slug: spec_for(slug).estimated_bytes(merged) for slug in known_slugs()},
        "sum_s": round(sum(row.total_s for row in rows), 2),
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
