"""From scorecards and limits to the winner and the reason against every other: a pure function."""

import math
from collections.abc import Sequence

from llava_ray.artifacts.records import Scorecard, VariantFailure
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.report.findings import Findings
from llava_ray.report.passport import refusals


def decide(
    scorecards: Sequence[Scorecard], failures: Sequence[VariantFailure], config: RunConfig
) -> Findings:
    """Pick the best by the preference among those within all limits.

    Equals in what is preferred are ordered by the other two measures, then by slug, so the
    order of the scorecards never matters. Raises ConfigError when nothing fits, with each
    variant's reason, and for scorecards of several devices.
    """
    _check_device(scorecards)
    against = {failure.slug: f"failed: {failure.reason}" for failure in failures}
    fitting: list[Scorecard] = []
    for card in scorecards:
        if broken := violations(card, config):
            against[card.slug] = "; ".join(broken)
        else:
            fitting.append(card)
    if not fitting:
        listed = ", ".join(f"{slug} ({reason})" for slug, reason in sorted(against.items()))
        if {card.slug for card in scorecards} <= {config.benchmark.baseline}:
            raise ConfigError(f"no variant to choose from beside the baseline: {listed}")
        raise ConfigError(f"no variant keeps the limits of choose, loosen one: {listed}")
    prefer = config.choose.prefer
    winner = min(fitting, key=lambda card: (*_ranks(card, prefer).values(), card.slug))
    for card in fitting:
        if card.slug != winner.slug:
            against[card.slug] = _lost(card, winner, prefer)
    return Findings(
        config=config,
        scorecards=tuple(scorecards),
        failures=tuple(failures),
        winner=winner,
        reasons=_reasons(winner, len(fitting), config),
        against=dict(sorted(against.items())),
    )


def _check_device(scorecards: Sequence[Scorecard]) -> None:
    measured: dict[str, list[str]] = {}
    for card in scorecards:
        measured.setdefault(card.device_name, []).append(card.slug)
    if len(measured) > 1:
        each = "; ".join(f"{name}: {', '.join(slugs)}" for name, slugs in sorted(measured.items()))
        raise ConfigError(
            f"variants were measured on several devices, so their speeds do not compare ({each}): "
            "set benchmark.device to a part of the name of one"
        )


def violations(card: Scorecard, config: RunConfig) -> list[str]:
    """Return why a variant may not win; empty if it may."""
    limits, found = config.choose, []
    kl, rate = card.kl_divergence.median, card.decode_tokens_per_s.median
    if card.slug == config.benchmark.baseline and not limits.may_choose_baseline:
        found.append("it is the baseline, and choose.may_choose_baseline is false")
    if not math.isfinite(kl):
        found.append(f"KL divergence is {kl}: its predictions are broken")
    elif limits.max_kl_divergence is not None and kl > limits.max_kl_divergence:
        found.append(f"KL divergence {kl:.4g} nats is above {limits.max_kl_divergence:g}")
    if not rate > 0:
        found.append(f"speed is {rate}: nothing was decoded")
    elif limits.min_decode_tokens_per_s is not None and rate < limits.min_decode_tokens_per_s:
        found.append(f"{rate:.4g} tokens/s is below {limits.min_decode_tokens_per_s:g}")
    if limits.max_size_bytes is not None and card.variant_bytes > limits.max_size_bytes:
        found.append(f"{card.variant_bytes:,} bytes on disk are above {limits.max_size_bytes:,}")
    return found + refusals(card.slug, limits.must_open_in)


def _ranks(card: Scorecard, prefer: str) -> dict[str, float]:
    """Return what decides, lowest first: each measure where those before it are equal."""
    ranks = {
        "speed": -card.decode_tokens_per_s.median,
        "size": card.variant_bytes,
        "fidelity": card.kl_divergence.median,
    }
    return {prefer: ranks[prefer]} | ranks


def describe(card: Scorecard, prefer: str) -> str:
    """Write the measure that a preference looks at."""
    if prefer == "speed":
        return f"{card.decode_tokens_per_s.median:.4g} tokens/s"
    if prefer == "size":
        return f"{card.variant_bytes:,} bytes on disk"
    return f"KL divergence {card.kl_divergence.median:.4g} nats"


def _lost(card: Scorecard, winner: Scorecard, prefer: str) -> str:
    best = _ranks(winner, prefer)
    for measure, rank in _ranks(card, prefer).items():
        if rank != best[measure]:
            equals = "" if measure == prefer else f" and equals in {prefer}"
            return (
                f"keeps the limits{equals}, but {describe(card, measure)} "
                f"against {describe(winner, measure)}"
            )
    return f"keeps the limits and equals {winner.slug} in all; the name decided"


def _reasons(winner: Scorecard, fitting: int, config: RunConfig) -> tuple[str, ...]:
    limits, kl = config.choose, winner.kl_divergence
    ceiling = limits.max_kl_divergence
    kept = []
    if ceiling is not None:
        kept.append(f"KL divergence {kl.median:.4g} nats is within {ceiling:g}")
    if limits.min_decode_tokens_per_s is not None:
        kept.append(f"{describe(winner, 'speed')} are at least {limits.min_decode_tokens_per_s:g}")
    if limits.max_size_bytes is not None:
        kept.append(f"{describe(winner, 'size')} are within {limits.max_size_bytes:,}")
    if ceiling is not None and kl.high > ceiling:
        kept.append(
            f"caution: the 95% interval of its KL divergence reaches {kl.high:.4g} nats; "
            "raise benchmark.fidelity_samples to be surer"
        )
    best = {"speed": "fastest", "size": "smallest", "fidelity": "closest to the baseline"}
    among = "the only one" if fitting == 1 else f"the {best[limits.prefer]} of {fitting}"
    first = f"{among} within the limits: {describe(winner, limits.prefer)}"
    return (first, *kept)
