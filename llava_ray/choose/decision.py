"""From scorecards and limits to the winner and the reason against every other: a pure function."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava_ray.artifacts.records import Scorecard, VariantFailure
from llava_ray.config.run import ChooseConfig
from llava_ray.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What the winner must keep, and what decides among those that keep it."""

    baseline: str
    """The baseline's slug."""
    config: ChooseConfig


@dataclass(frozen=True)
class Decision:
    """The winner and why; `against` has a reason for every other variant, the failed included."""

    winner: Scorecard
    reasons: tuple[str, ...]
    against: dict[str, str]


def decide(
    scorecards: Sequence[Scorecard], failures: Sequence[VariantFailure], limits: Limits
) -> Decision:
    """Pick the best by the preference among those within all limits.

    Equals in what is preferred are ordered by the other two measures, then by slug, so the
    order of the scorecards never matters. Raises ConfigError when nothing fits, with each
    variant's reason.
    """
    against = {failure.slug: f"failed: {failure.reason}" for failure in failures}
    fitting: list[Scorecard] = []
    for card in scorecards:
        broken = violations(card, limits)
        if broken:
            against[card.slug] = "; ".join(broken)
        else:
            fitting.append(card)
    if not fitting:
        listed = ", ".join(f"{slug} ({reason})" for slug, reason in sorted(against.items()))
        if {card.slug for card in scorecards} <= {limits.baseline}:
            raise ConfigError(f"no variant to choose from beside the baseline: {listed}")
        raise ConfigError(f"no variant keeps the limits of choose, loosen one: {listed}")
    winner = min(fitting, key=lambda card: _rank(card, limits))
    for card in fitting:
        if card.slug != winner.slug:
            against[card.slug] = _lost(card, winner, limits)
    return Decision(winner, _reasons(winner, len(fitting), limits), dict(sorted(against.items())))


def violations(card: Scorecard, limits: Limits) -> list[str]:
    """Return why a variant may not win; empty if it may."""
    config, found = limits.config, []
    kl, rate = card.kl_divergence.median, card.decode_tokens_per_s.median
    if card.slug == limits.baseline and not config.may_choose_baseline:
        found.append("it is the baseline, and choose.may_choose_baseline is false")
    if not math.isfinite(kl):
        found.append(f"KL divergence is {kl}: its predictions are broken")
    elif config.max_kl_divergence is not None and kl > config.max_kl_divergence:
        found.append(f"KL divergence {kl:.4g} nats is above {config.max_kl_divergence:g}")
    if not rate > 0:
        found.append(f"speed is {rate}: nothing was decoded")
    elif config.min_decode_tokens_per_s is not None and rate < config.min_decode_tokens_per_s:
        found.append(f"{rate:.4g} tokens/s is below {config.min_decode_tokens_per_s:g}")
    if config.max_size_bytes is not None and card.variant_bytes > config.max_size_bytes:
        found.append(f"{card.variant_bytes:,} bytes on disk are above {config.max_size_bytes:,}")
    return found


def _rank(card: Scorecard, limits: Limits) -> tuple[float, float, float, str]:
    speed, kl = -card.decode_tokens_per_s.median, card.kl_divergence.median
    size = float(card.variant_bytes)
    order = {
        "speed": (speed, size, kl),
        "size": (size, speed, kl),
        "fidelity": (kl, speed, size),
    }[limits.config.prefer]
    return (*order, card.slug)


def describe(card: Scorecard, prefer: str) -> str:
    """Write the measure that a preference looks at."""
    if prefer == "speed":
        return f"{card.decode_tokens_per_s.median:.4g} tokens/s"
    if prefer == "size":
        return f"{card.variant_bytes:,} bytes on disk"
    return f"KL divergence {card.kl_divergence.median:.4g} nats"


def _lost(card: Scorecard, winner: Scorecard, limits: Limits) -> str:
    prefer = limits.config.prefer
    own, best = _rank(card, limits), _rank(winner, limits)
    if own[0] != best[0]:
        return f"keeps the limits, but {describe(card, prefer)} against {describe(winner, prefer)}"
    second = "size" if prefer == "speed" else "speed"
    third = "size" if prefer == "fidelity" else "fidelity"
    for place, measure in ((1, second), (2, third)):
        if own[place] != best[place]:
            return (
                f"keeps the limits and equals in {prefer}, but {describe(card, measure)} "
                f"against {describe(winner, measure)}"
            )
    return f"keeps the limits and equals {winner.slug} in all; the name decided"


def _reasons(winner: Scorecard, fitting: int, limits: Limits) -> tuple[str, ...]:
    config = limits.config
    kl, ceiling = winner.kl_divergence, config.max_kl_divergence
    kept = []
    if ceiling is not None:
        kept.append(f"KL divergence {kl.median:.4g} nats is within {ceiling:g}")
    if config.min_decode_tokens_per_s is not None:
        kept.append(f"{describe(winner, 'speed')} are at least {config.min_decode_tokens_per_s:g}")
    if config.max_size_bytes is not None:
        kept.append(f"{describe(winner, 'size')} are within {config.max_size_bytes:,}")
    if ceiling is not None and kl.high > ceiling:
        kept.append(
            f"caution: the 95% interval of its KL divergence reaches {kl.high:.4g} nats; "
            "raise benchmark.fidelity_samples to be surer"
        )
    best = {"speed": "fastest", "size": "smallest", "fidelity": "closest to the baseline"}
    among = "the only one" if fitting == 1 else f"the {best[config.prefer]} of {fitting}"
    first = f"{among} within the limits: {describe(winner, config.prefer)}"
    return (first, *kept)
