"""The report's table as data: one row per variant, the failed and the unasked-for included."""

import shlex
from typing import Any

from llava_ray.artifacts.records import Frozen, Scorecard, Spread
from llava_ray.benchmark.fidelity import paired_difference
from llava_ray.report import article
from llava_ray.report.findings import Findings, Origins


class Row(Frozen):
    """One variant's line; fields without a value were not measured."""

    slug: str
    status: str
    """`winner`, `baseline`, `measured`, `failed` or `not asked for`."""
    reason: str
    """Why it won, or why not."""
    command: str
    """What makes and measures this row again."""
    on_front: bool = False
    """No other variant is at least as good in size, speed and fidelity, and better in one."""
    size_bytes: int | None = None
    estimated_bytes: int | None = None
    """Size as it was expected before quantizing."""
    bits_per_weight: float | None = None
    quantize_s: float | None = None
    quantize_peak_memory_bytes: int | None = None
    memory_bytes: int | None = None
    load_s: float | None = None
    prefill_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    bandwidth_share: float | None = None
    kl_divergence: Spread | None = None
    kl_minus_winner: Spread | None = None
    """Paired by sample; an interval without 0 in it is a difference."""
    top1_agreement: float | None = None
    perplexity: float | None = None
    scores: dict[str, float] = {}
    device: str | None = None
    article_size_gb: float | None = None
    article_tokens_per_s: float | None = None


_FROM_SCORECARD = (
    "memory_bytes", "load_s", "prefill_s", "decode_tokens_per_s", "bandwidth_share",
    "kl_divergence", "top1_agreement", "perplexity", "scores", "device",
)  # fmt: skip


def make_rows(findings: Findings, origins: Origins) -> list[Row]:
    """Return the measured variants by size, then the failed, then the article's others."""
    front = pareto_front(findings.scorecards)
    measured = sorted(findings.scorecards, key=lambda card: (card.variant_bytes, card.slug))
    rows = [_measured(card, findings, origins, front) for card in measured]
    for failure in sorted(findings.failures, key=lambda failure: failure.slug):
        rows.append(_row(findings, failure.slug, "failed", failure.reason))
    known = {row.slug for row in rows}
    reason = "not asked for: add it to quantize.variants"
    others = [slug for slug in article.TABLE if slug not in known]
    return rows + [_row(findings, slug, "not asked for", reason) for slug in others]


def pareto_front(cards: tuple[Scorecard, ...]) -> set[str]:
    """Return the slugs that no other variant dominates in size, speed and KL divergence."""
    points = {
        c.slug: (c.variant_bytes, -c.decode_tokens_per_s.median, c.kl_divergence.median)
        for c in cards
    }
    return {
        slug
        for slug, point in points.items()
        if not any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )
    }


def _measured(card: Scorecard, findings: Findings, origins: Origins, front: set[str]) -> Row:
    status, reason = "measured", findings.against.get(card.slug, "")
    if card.slug == findings.config.benchmark.baseline:
        status = "baseline"
    if card.slug == findings.winner.slug:
        status, reason = "winner", "; ".join(findings.reasons)
    variant, fidelity, difference = origins.variants[card.slug], origins.fidelity, None
    if card.slug != findings.winner.slug:
        difference = paired_difference(fidelity[card.slug], fidelity[findings.winner.slug])
    return _row(
        findings,
        card.slug,
        status,
        reason,
        on_front=card.slug in front,
        size_bytes=card.variant_bytes,
        estimated_bytes=variant.estimated_bytes,
        bits_per_weight=variant.bits_per_weight,
        quantize_s=variant.quantize_s,
        quantize_peak_memory_bytes=variant.peak_memory_bytes,
        kl_minus_winner=difference,
        **{name: getattr(card, name) for name in _FROM_SCORECARD},
    )


def _row(findings: Findings, slug: str, status: str, reason: str, **measured: Any) -> Row:
    size, rate = article.TABLE.get(slug, (None, None))
    slugs = ", ".join(dict.fromkeys((findings.config.benchmark.baseline, slug)))
    override = shlex.quote(f"quantize.variants=[{slugs}]")
    return Row(
        slug=slug,
        status=status,
        reason=reason,
        # The config lies beside the report.
        command=f"llava-ray benchmark --config config.yaml {override}",
        article_size_gb=size,
        article_tokens_per_s=rate,
        **measured,
    )
