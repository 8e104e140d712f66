"""Two variants on the same held-out samples: what one choice of a method changes."""

from pathlib import Path

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import Scorecard, Variant, VariantFailure
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.bench import results
from llava_ray.benchmark.fidelity import paired_difference, read_fidelity
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import VariantError
from llava_ray.models.folder import EMBEDDED, weights_sha256
from llava_ray.pipeline import run_benchmark
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration


def compare(config: RunConfig, first: str, second: str, out: Path) -> Path:
    """Make and measure both, and write both scorecards' figures and the paired difference.

    Only what is missing is run. Raises ConfigError for an unknown slug, VariantError for a
    variant that cannot be made or measured.
    """
    variants = tuple(dict.fromkeys((config.benchmark.baseline, first, second)))
    config = changed(config, quantize={"variants": variants})
    measured = {result.slug: result for result in run_benchmark(config)}
    a, b = (scorecard(measured[slug]) for slug in (first, second))
    difference = paired_difference(read_fidelity(a), read_fidelity(b))
    figures = {"kl_divergence", "top1_agreement", "perplexity", "scores"}
    sections = {"model", "data", "train", "merge", "quantize", "benchmark"}
    tree = {
        "config": config.model_dump(mode="json", include=sections),
        "device": a.device,
        "versions": a.versions,
        "code_version": a.code_version,
        "variants": {
            card.slug: {"size_bytes": card.variant_bytes, **card.model_dump(include=figures)}
            for card in (a, b)
        },
        "kl_difference": {
            "what": f"KL of {first} minus KL of {second}, nats per token, paired by sample",
            "mean": difference.median,
            "low": difference.low,
            "high": difference.high,
        },
    }
    return results.write(out, "awq_calibration", tree)


def scorecard(result: Scorecard | VariantFailure) -> Scorecard:
    """Return a variant's scorecard; raise VariantError with the reason where there is none."""
    if isinstance(result, VariantFailure):
        raise VariantError(f"variant {result.slug!r}: {result.reason}")
    return result


def base_variant(
    store: ArtifactStore, slug: str, base: Path = EMBEDDED, device: str = "cpu"
) -> Variant:
    """Return a base model's folder, not fine-tuned, as a variant without calibration."""
    settings = {"slug": slug, "base": weights_sha256(base)}
    name = artifact_id(Variant.kind, settings)
    spec = spec_for(slug)
    with store.build(Variant, name, settings=settings) as build:
        if build.found:
            return build.found
        spec.quantize(base, build.folder, Calibration("", 0), device)
        return build.finish(
            Variant, device=device, slug=slug, method=spec.method,
            bits_per_weight=spec.bits_per_weight(), quantize_s=0, peak_memory_bytes=0,
        )  # fmt: skip
