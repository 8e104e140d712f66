"""What fine-tuning gains and quantization loses on the embedded model, over seeds."""

import json
import logging
import shutil
import statistics
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import Scorecard, Variant, VariantFailure
from llava_ray.artifacts.store import ArtifactStore, artifact_id
from llava_ray.benchmark.measure import measure_captions
from llava_ray.benchmark.plan import make_plan
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.folder import EMBEDDED, weights_sha256
from llava_ray.pipeline import run_benchmark, run_prepare

logger = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
"""Of the training; the data set and its split are the same for all."""


def score(config: RunConfig, out: Path) -> Path:
    """Score the base, the fine-tuned model of each seed, and every variant of the first seed's.

    All on the same held-out scenes, whose words and fonts pretraining never saw. Raises
    ConfigError for another model, VariantError where the baseline cannot be measured.
    """
    import ray

    if config.model.path != "embedded":
        raise ConfigError(f"model.path is {config.model.path!r}: this scores 'embedded' alone")
    dataset = run_prepare(config)
    store = ArtifactStore(config.storage.uri)
    plan = make_plan(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    base = measure_captions(plan, base_variant(store), dataset)
    results = run_benchmark(_with_seed(config, SEEDS[0]))
    tuned = {SEEDS[0]: _scores(config, results)}
    for seed in SEEDS[1:]:
        seeded = _with_seed(config, seed, only=config.benchmark.baseline)
        tuned[seed] = _scores(config, run_benchmark(seeded))
    tree = {
        "config": config.model_dump(mode="json", include={"data", "train", "benchmark"}),
        "code_digest": code_digest("embedded"),
        "base_model_sha256": weights_sha256(EMBEDDED),
        "held_out_samples": min(dataset.num_test, config.benchmark.caption_samples),
        "base": base,
        "fine_tuned": {str(seed): scores for seed, scores in tuned.items()},
        "fine_tuned_mean": _over_seeds(tuned, statistics.mean),
        "fine_tuned_standard_deviation": _over_seeds(tuned, statistics.stdev),
        "variants": {result.slug: _variant(result) for result in results},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def base_variant(store: ArtifactStore) -> Variant:
    """Return the untrained base as a variant, so that it is measured as all are."""
    settings = {"slug": "none-fp16", "base": weights_sha256(EMBEDDED)}
    name = artifact_id(Variant.kind, settings)
    found = store.find(Variant, name)
    if found is not None:
        return found
    with store.build(Variant, name, settings=settings) as build:
        shutil.copytree(EMBEDDED, build.folder, dirs_exist_ok=True)
        return build.finish(
            Variant, device="cpu", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=0, peak_memory_bytes=0,
        )  # fmt: skip


def _with_seed(config: RunConfig, seed: int, only: str | None = None) -> RunConfig:
    update: dict[str, Any] = {"train": config.train.model_copy(update={"seed": seed})}
    if only is not None:
        update["quantize"] = config.quantize.model_copy(update={"variants": (only,)})
    return config.model_copy(update=update)


def _scores(config: RunConfig, results: list[Scorecard | VariantFailure]) -> dict[str, float]:
    for result in results:
        if result.slug == config.benchmark.baseline and isinstance(result, Scorecard):
            return result.scores
    raise VariantError(f"baseline {config.benchmark.baseline!r} was not measured: see the log")


def _over_seeds(tuned: dict[int, dict[str, float]], how: Any) -> dict[str, float]:
    names = next(iter(tuned.values()))
    return {name: how([scores[name] for scores in tuned.values()]) for name in names}


def _variant(result: Scorecard | VariantFailure) -> dict[str, Any]:
    if isinstance(result, VariantFailure):
        return {"failed": result.reason}
    return {
        "size_bytes": result.variant_bytes,
        "kl_divergence": result.kl_divergence.median,
        "top1_agreement": result.top1_agreement,
        "scores": result.scores,
    }
