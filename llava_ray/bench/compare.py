"""Two variants on the same held-out samples: what one choice of a method changes."""

import json
import logging
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import Scorecard, VariantFailure
from llava_ray.benchmark.fidelity import paired_difference
from llava_ray.benchmark.measure import read_fidelity
from llava_ray.config.run import RunConfig
from llava_ray.errors import VariantError
from llava_ray.pipeline import run_benchmark

logger = logging.getLogger(__name__)


def compare(config: RunConfig, first: str, second: str, out: Path) -> Path:
    """Make and measure both, and write both scorecards' figures and the paired difference.

    Only what is missing is run. Raises ConfigError for an unknown slug, VariantError for a
    variant that cannot be made or measured.
    """
    variants = tuple(dict.fromkeys((config.benchmark.baseline, first, second)))
    quantize = config.quantize.model_copy(update={"variants": variants})
    config = config.model_copy(update={"quantize": quantize})
    measured = {result.slug: result for result in run_benchmark(config)}
    a, b = (_card(measured[slug]) for slug in (first, second))
    difference = paired_difference(read_fidelity(a), read_fidelity(b))
    tree = {
        "config": config.model_dump(
            mode="json", include={"model", "data", "train", "merge", "quantize", "benchmark"}
        ),
        "device": a.device,
        "versions": a.versions,
        "code_version": a.code_version,
        "code_digest": code_digest("awq_calibration"),
        "variants": {card.slug: _figures(card) for card in (a, b)},
        "kl_difference": {
            "what": f"KL of {first} minus KL of {second}, nats per token, paired by sample",
            "mean": difference.median,
            "low": difference.low,
            "high": difference.high,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    logger.info(
        "%s minus %s: %.4f nats (%.4f to %.4f)",
        first, second, difference.median, difference.low, difference.high,
    )  # fmt: skip
    return out


def _card(measured: Scorecard | VariantFailure) -> Scorecard:
    if isinstance(measured, VariantFailure):
        raise VariantError(f"variant {measured.slug!r}: {measured.reason}")
    return measured


def _figures(card: Scorecard) -> dict[str, Any]:
    return {
        "size_bytes": card.variant_bytes,
        "kl_divergence": card.kl_divergence.model_dump(),
        "top1_agreement": card.top1_agreement,
        "perplexity": card.perplexity,
        "scores": card.scores,
    }
