"""The report's table as data: one row per variant, the failed and the unasked-for included."""

import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_ray.artifacts.records import Scorecard, Spread
from llava_ray.benchmark.fidelity import paired_difference
from llava_ray.report import article
from llava_ray.report.findings import Findings, Origins


class Row(BaseModel):
    """One variant's line; fields without a value were not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


def make_rows(findings: Findings, origins: Origins) -> list[Row]:
    """Return the measured variants by size, then the failed, then the article's others."""
    front = pareto_front(findings.scorecards)
    measured = sorted(findings.scorecards, key=lambda card: (card.variant_bytes, card.slug))
    rows = [_measured(card, findings, origins, front) for card in measured]
    for failure in sorted(findings.failures, key=lambda failure: failure.slug):
        rows.append(_unmeasured(failure.slug, "failed", failure.reason, findings))
    known = {row.slug for row in rows}
    reason = "not asked for: add it to quantize.variants"
    rows += [
        _unmeasured(slug, "not asked for", reason, findings)
        for slug in article.TABLE
        if slug not in known
    ]
    return rows


def pareto_front(cards: tuple[Scorecard, ...]) -> set[str]:
    """Return the slugs that no other variant dominates in size, speed and KL divergence."""
    points = {
        card.slug: (
            card.variant_bytes,
            -card.decode_tokens_per_s.median,
            card.kl_divergence.median,
        )
        for card in cards
    }
    return {
        slug
        for slug, point in points.items()
        if not any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )
    }


def command_for(slug: str, findings: Findings) -> str:
    """Return the command that makes and measures a variant, with the config beside the report."""
    baseline = findings.config.benchmark.baseline
    slugs = ", ".join(dict.fromkeys((baseline, slug)))
    override = shlex.quote(f"quantize.variants=[{slugs}]")
    return f"python jobs/benchmark.py --config config.yaml {override}"


def _measured(card: Scorecard, findings: Findings, origins: Origins, front: set[str]) -> Row:
    status, reason = "measured", findings.against.get(card.slug, "")
    if card.slug == findings.config.benchmark.baseline:
        status = "baseline"
    if card.slug == findings.winner:
        status, reason = "winner", "; ".join(findings.reasons)
    variant = origins.variants[card.slug]
    return Row(
        slug=card.slug,
        status=status,
        reason=reason,
        command=command_for(card.slug, findings),
        on_front=card.slug in front,
        size_bytes=card.variant_bytes,
        estimated_bytes=variant.estimated_bytes,
        bits_per_weight=variant.bits_per_weight,
        quantize_s=variant.quantize_s,
        quantize_peak_memory_bytes=variant.peak_memory_bytes,
        memory_bytes=card.memory_bytes,
        load_s=card.load_s,
        prefill_s=card.prefill_s,
        decode_tokens_per_s=card.decode_tokens_per_s,
        bandwidth_share=card.bandwidth_share,
        kl_divergence=card.kl_divergence,
        kl_minus_winner=_minus_winner(card.slug, findings, origins),
        top1_agreement=card.top1_agreement,
        perplexity=card.perplexity,
        scores=card.scores,
        device=card.device,
        **_article(card.slug),
    )


def _minus_winner(slug: str, findings: Findings, origins: Origins) -> Spread | None:
    if slug == findings.winner:
        return None
    return paired_difference(origins.fidelity[slug], origins.fidelity[findings.winner])


def _unmeasured(slug: str, status: str, reason: str, findings: Findings) -> Row:
    command = command_for(slug, findings)
    return Row(slug=slug, status=status, reason=reason, command=command, **_article(slug))


def _article(slug: str) -> dict[str, Any]:
    if slug not in article.TABLE:
        return {}
    size, rate = article.TABLE[slug]
    return {"article_size_gb": size, "article_tokens_per_s": rate}
