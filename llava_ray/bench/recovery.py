"""What LoRA over a 2-bit base wins back, beside rounding the fine-tuned model to 2 bits.

Both start from the same base and data and go through the product's own stages. Source of the idea:
HQQ+ (https://mobiusml.github.io/1bit_blog).
"""

import json
import statistics
from pathlib import Path
from typing import Any

from llava_ray import benchmark
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import Scorecard, Variant, VariantFailure
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.bench.embedded import SEEDS, base_variant
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.folder import EMBEDDED, weights_sha256
from llava_ray.pipeline import run_prepare, run_quantize

BASELINE = "none-fp16"
"""The model fine-tuned in 16 bits: what the others' KL divergence is measured against."""
ROUNDED = "hqq-w2-g64"
"""That model rounded to 2 bits, as quantize does."""
RECOVERED = "none-fp32"
"""LoRA trained over the 2-bit base and folded into its values; in fp32, so that no other rounding
is measured, and under a slug of its own beside the baseline's."""
ROWS = {
    "fine-tuned, 16 bits": BASELINE,
    "fine-tuned, then 2 bits": ROUNDED,
    "2-bit base, then LoRA": RECOVERED,
}


def run(config: RunConfig, out: Path) -> Path:
    """Train both ways with each seed, measure all on the held-out split and write JSON.

    Raises ConfigError for another model than the embedded one, whose words the scores count.
    """
    if config.model.path != "embedded":
        raise ConfigError(f"model.path is {config.model.path!r}: this scores 'embedded' alone")
    dataset = run_prepare(config)
    found: dict[str, list[Scorecard]] = {name: [] for name in ROWS}
    for seed in SEEDS:
        plain = _changed(config, seed, "lora", (BASELINE, ROUNDED), BASELINE)
        low = _changed(config, seed, "hqq", (RECOVERED,), RECOVERED)
        variants = [*run_quantize(plain), *run_quantize(low)]
        cards = {card.slug: card for card in map(_whole, benchmark.run(plain, variants, dataset))}
        for name, slug in ROWS.items():
            found[name].append(cards[slug])
    base = base_variant(ArtifactStore(config.storage.uri))
    tree = {
        "config": config.model_dump(mode="json", include={"data", "train", "benchmark"}),
        "code_digest": code_digest("hqq_recovery"),
        "base_model_sha256": weights_sha256(EMBEDDED),
        "seeds": SEEDS,
        "base": benchmark.score_captions(config, base, dataset),
        "rows": {name: [_row(card) for card in cards] for name, cards in found.items()},
        "mean": {name: _over_seeds(cards, statistics.mean) for name, cards in found.items()},
        "standard_deviation": {
            name: _over_seeds(cards, statistics.stdev) for name, cards in found.items()
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def _changed(
    config: RunConfig, seed: int, method: str, variants: tuple[str, ...], baseline: str
) -> RunConfig:
    tree = config.model_dump()
    tree["train"] |= {"seed": seed, "method": method, "hqq_bits": 2}
    tree["quantize"]["variants"] = variants
    tree["benchmark"]["baseline"] = baseline
    return RunConfig.model_validate(tree)


def _whole(result: Scorecard | VariantFailure | Variant) -> Scorecard:
    if not isinstance(result, Scorecard):
        raise VariantError(f"{result.slug} was not measured: see the log")
    return result


def _row(card: Scorecard) -> dict[str, Any]:
    return {"kl_divergence": card.kl_divergence.median, **card.scores}


def _over_seeds(cards: list[Scorecard], how: Any) -> dict[str, float]:
    rows = [_row(card) for card in cards]
    return {key: how([row[key] for row in rows]) for key in rows[0]}
