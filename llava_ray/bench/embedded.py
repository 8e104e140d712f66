"""On the embedded model, over seeds: what fine-tuning gains and quantization loses, and what LoRA
over a 2-bit base wins back.

All goes through the product's own stages and is scored on the same held-out scenes, whose words and
fonts pretraining never saw.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_ray import benchmark
from llava_ray.artifacts.records import DatasetRecord, Scorecard, VariantFailure
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.bench import results
from llava_ray.bench.compare import base_variant, scorecard
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import ConfigError
from llava_ray.models.folder import EMBEDDED, weights_sha256
from llava_ray.pipeline import run_benchmark, run_prepare, run_quantize

SEEDS = (0, 1, 2)
"""Of the training; the data set and its split are the same for all."""
RECOVERY = {
    "fine-tuned, 16 bits": "none-fp16",
    "fine-tuned, then 2 bits": "hqq-w2-g64",
    # In fp32, so that no other rounding is measured, and under a slug of its own.
    "2-bit base, then LoRA": "none-fp32",
}
"""By row: the slug. The first is what the others' KL divergence is measured against."""


def score(config: RunConfig, out: Path) -> Path:
    """Score the base, the fine-tuned model of each seed, and every variant of the first seed's.

    Raises ConfigError for another model, VariantError where the baseline cannot be measured.
    """
    dataset, about = _begin(config)
    baseline = config.benchmark.baseline
    measured = run_benchmark(changed(config, train={"seed": SEEDS[0]}))
    cards = [next(result for result in measured if result.slug == baseline)]
    for seed in SEEDS[1:]:
        only = changed(config, train={"seed": seed}, quantize={"variants": (baseline,)})
        cards += run_benchmark(only)
    tuned = [scorecard(card).scores for card in cards]
    tree = about | {
        "held_out_samples": min(dataset.num_test, config.benchmark.caption_samples),
        "fine_tuned": dict(zip(SEEDS, tuned, strict=True)),
        "fine_tuned_mean": over_seeds(tuned, statistics.mean),
        "fine_tuned_standard_deviation": over_seeds(tuned, statistics.stdev),
        "variants": {result.slug: _variant(result) for result in measured},
    }
    return results.write(out, "embedded", tree)


def recover(config: RunConfig, out: Path) -> Path:
    """Train with each seed in 16 bits and over a 2-bit base, and measure both and the 2-bit model.

    Raises ConfigError for another model, VariantError for what cannot be measured. Source of the
    idea: HQQ+ (https://mobiusml.github.io/1bit_blog).
    """
    dataset, about = _begin(config)
    baseline, rounded, recovered = RECOVERY.values()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in RECOVERY}
    for seed in SEEDS:
        plain = changed(
            config, train={"seed": seed, "method": "lora"},
            quantize={"variants": (baseline, rounded)}, benchmark={"baseline": baseline},
        )  # fmt: skip
        low = changed(
            config, train={"seed": seed, "method": "hqq", "hqq_bits": 2},
            quantize={"variants": (recovered,)}, benchmark={"baseline": recovered},
        )  # fmt: skip
        variants = [*run_quantize(plain), *run_quantize(low)]
        cards = {result.slug: result for result in benchmark.run(plain, variants, dataset)}
        for name, slug in RECOVERY.items():
            card = scorecard(cards[slug])
            rows[name].append({"kl_divergence": card.kl_divergence.median, **card.scores})
    tree = about | {
        "seeds": SEEDS,
        "rows": rows,
        "mean": {name: over_seeds(found, statistics.mean) for name, found in rows.items()},
        "standard_deviation": {
            name: over_seeds(found, statistics.stdev) for name, found in rows.items()
        },
    }
    return results.write(out, "hqq_recovery", tree)


def _begin(config: RunConfig) -> tuple[DatasetRecord, dict[str, Any]]:
    """Return the data set, and what both results files say of the base model."""
    if config.model.path != "embedded":
        raise ConfigError(f"model.path is {config.model.path!r}: this scores 'embedded' alone")
    dataset = run_prepare(config)
    base = base_variant(ArtifactStore(config.storage.uri), "none-fp16")
    return dataset, {
        "config": config.model_dump(mode="json", include={"data", "train", "benchmark"}),
        "base_model_sha256": weights_sha256(EMBEDDED),
        "base": benchmark.score_captions(config, base, dataset),
    }


def over_seeds(
    rows: Sequence[dict[str, float]], how: Callable[[list[float]], float]
) -> dict[str, float]:
    """Return each score's mean or deviation over the rows, one per seed."""
    return {name: how([row[name] for row in rows]) for name in rows[0]}


def _variant(result: Scorecard | VariantFailure) -> dict[str, Any]:
    if isinstance(result, VariantFailure):
        return {"failed": result.reason}
    return {
        "size_bytes": result.variant_bytes,
        "kl_divergence": result.kl_divergence.median,
        "top1_agreement": result.top1_agreement,
        "scores": result.scores,
    }
