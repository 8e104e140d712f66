"""The choice as a function: limits kept, every loser with a reason, order without influence."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_ray.artifacts.records import Scorecard, Spread, VariantFailure
from llava_ray.choose.decision import decide, violations
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.report.findings import Findings

BASELINE = "none-fp16"


def card(slug: str, size: int = 100, rate: float = 10.0, kl: float = 0.01) -> Scorecard:
    def spread(value: float) -> Spread:
        return Spread(median=value, low=value, high=value, repeats=3)

    return Scorecard(
        id=f"scorecard-{slug}", uri="", parents=(), settings={}, code_version="0", created="",
        wall_s=1, device="cpu", files={}, slug=slug, variant_uri="", dataset_uri="", versions={},
        variant_bytes=size, memory_bytes=1, weight_bytes=1, copy_bytes_per_s=1, load_s=1,
        prefill_s=spread(1), decode_tokens_per_s=spread(rate), kl_divergence=spread(kl),
        top1_agreement=1, perplexity=1, scores={}, generations=(),
    )  # fmt: skip


def limits(**fields: object) -> RunConfig:
    return RunConfig.model_validate({"benchmark": {"baseline": BASELINE}, "choose": fields})


def test_variants_measured_on_several_devices_are_not_compared() -> None:
    """B3"""
    cards = [
        card(slug).model_copy(update={"settings": {"device_name": name}})
        for slug, name in (("a", "NVIDIA L4"), ("b", "NVIDIA H100"), ("c", "NVIDIA L4"))
    ]
    assert decide(cards[::2], [], limits()).winner.slug == "a"
    with pytest.raises(ConfigError, match="NVIDIA H100: b; NVIDIA L4: a, c.*benchmark.device"):
        decide(cards, [], limits())


@pytest.mark.parametrize(
    ("prefer", "winner"), [("speed", "fast"), ("size", "small"), ("fidelity", "close")]
)
def test_the_preference_decides_among_those_within_the_limits(prefer: str, winner: str) -> None:
    cards = [
        card("fast", size=90, rate=50, kl=0.05),
        card("small", size=20, rate=10, kl=0.06),
        card("close", size=80, rate=20, kl=0.001),
        card("tiny but wrong", size=5, rate=99, kl=2.0),
    ]
    decision = decide(cards, [], limits(prefer=prefer))
    assert decision.winner.slug == winner
    assert decision.against["tiny but wrong"] == "KL divergence 2 nats is above 0.1"


def test_a_tie_goes_to_the_next_measure_and_the_reason_says_so() -> None:
    cards = [card("a", size=30, rate=10), card("b", size=20, rate=10)]
    decision = decide(cards, [], limits(prefer="speed"))
    assert decision.winner.slug == "b"
    assert decision.against["a"] == (
        "keeps the limits and equals in speed, but 30 bytes on disk against 20 bytes on disk"
    )


def test_the_winner_opens_where_it_must() -> None:
    cards = [card("gguf-q4_k_m", rate=50), card("hqq-w4-g64", rate=40), card("awq-w4-g128", rate=9)]
    decision = decide(cards, [], limits(must_open_in=["vllm"]))
    assert decision.winner.slug == "awq-w4-g128"
    assert decision.against["hqq-w4-g64"].startswith("vllm 0.22.1, read to 0.33 does not open it: ")
    with pytest.raises(ConfigError, match=r"sglang .* does not open it"):
        decide(cards, [], limits(must_open_in=["sglang"]))


def test_full_ties_go_by_name() -> None:
    decision = decide([card("b"), card("a")], [], limits())
    assert decision.winner.slug == "a"
    assert decision.against["b"] == "keeps the limits and equals a in all; the name decided"


def test_failures_lose_with_their_own_reason() -> None:
    decision = decide([card("a")], [VariantFailure(slug="awq", reason="no package")], limits())
    assert decision.against == {"awq": "failed: no package"}
    assert decision.reasons[0] == "the only one within the limits: 10 tokens/s"


def test_the_baseline_wins_only_where_it_may() -> None:
    cards = [card(BASELINE, rate=99, kl=0), card("a")]
    assert decide(cards, [], limits()).winner.slug == "a"
    assert decide(cards, [], limits(may_choose_baseline=True)).winner.slug == BASELINE


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_broken_predictions_never_win_even_without_a_limit(kl: float) -> None:
    decision = decide([card("a", kl=kl, rate=99), card("b")], [], limits(max_kl_divergence=None))
    assert decision.winner.slug == "b"
    assert "broken" in decision.against["a"]


def test_nobody_fits_is_one_line_with_every_reason() -> None:
    cards = [card("a", kl=0.5), card("b", size=10**9, rate=1)]
    failed = [VariantFailure(slug="awq", reason="no package")]
    with pytest.raises(ConfigError) as caught:
        decide(cards, failed, limits(max_size_bytes=1000, min_decode_tokens_per_s=5))
    assert str(caught.value) == (
        "no variant keeps the limits of choose, loosen one: a (KL divergence 0.5 nats is above "
        "0.1), awq (failed: no package), b (1 tokens/s is below 5; 1,000,000,000 bytes on disk "
        "are above 1,000)"
    )


def test_with_nothing_measured_but_the_baseline_no_limit_is_to_blame() -> None:
    failed = [VariantFailure(slug="awq", reason="no package")]
    with pytest.raises(ConfigError, match="^no variant to choose from beside the baseline: awq"):
        decide([card(BASELINE)], failed, limits())


def test_an_interval_beyond_the_limit_is_said() -> None:
    near = card("a").model_copy(
        update={"kl_divergence": Spread(median=0.09, low=0.05, high=0.14, repeats=4)}
    )
    assert any("caution" in reason for reason in decide([near], [], limits()).reasons)


measures = st.tuples(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.01, 0.05, 0.5, float("nan")])
)
cards_of_any_kind = st.lists(measures, max_size=6).map(
    lambda rows: [
        card(BASELINE if i == 0 else f"v{i}", size, rate, kl)
        for i, (size, rate, kl) in enumerate(rows)
    ]
)
any_limits = st.builds(
    lambda kl, rate, size, prefer, base: limits(
        max_kl_divergence=kl, min_decode_tokens_per_s=rate, max_size_bytes=size, prefer=prefer,
        may_choose_baseline=base,
    ),
    st.sampled_from([None, 0.02, 0.1]), st.sampled_from([None, 2, 4]),
    st.sampled_from([None, 2, 4]), st.sampled_from(["speed", "size", "fidelity"]), st.booleans(),
)  # fmt: skip
failed = st.just([VariantFailure(slug="awq", reason="no package")])


def _try(
    cards: list[Scorecard], failures: list[VariantFailure], asked: RunConfig
) -> Findings | None:
    try:
        return decide(cards, failures, asked)
    except ConfigError:
        return None


@given(cards_of_any_kind, failed, any_limits)
def test_there_is_a_winner_exactly_where_one_keeps_the_limits(
    cards: list[Scorecard], failures: list[VariantFailure], asked: RunConfig
) -> None:
    fitting = [c for c in cards if not violations(c, asked)]
    decision = _try(cards, failures, asked)
    assert (decision is None) == (not fitting)
    if decision is None:
        return
    assert decision.winner in fitting and decision.reasons
    assert set(decision.against) == {c.slug for c in cards if c is not decision.winner} | {"awq"}
    assert all(decision.against.values())
    best = {
        "speed": max(c.decode_tokens_per_s.median for c in fitting),
        "size": min(c.variant_bytes for c in fitting),
        "fidelity": min(c.kl_divergence.median for c in fitting),
    }
    winner = decision.winner
    assert best[asked.choose.prefer] == {
        "speed": winner.decode_tokens_per_s.median,
        "size": winner.variant_bytes,
        "fidelity": winner.kl_divergence.median,
    }[asked.choose.prefer]  # fmt: skip


@given(cards_of_any_kind, any_limits, st.randoms())
def test_the_order_of_the_scorecards_never_matters(
    cards: list[Scorecard], asked: RunConfig, random: st.DataObject
) -> None:
    shuffled = list(cards)
    random.shuffle(shuffled)
    first, second = _try(cards, [], asked), _try(shuffled, [], asked)
    assert (first is None) == (second is None)
    if first and second:
        assert first.winner == second.winner
        assert (first.reasons, first.against) == (second.reasons, second.against)


@given(cards_of_any_kind, any_limits)
def test_taking_away_a_loser_changes_no_winner(cards: list[Scorecard], asked: RunConfig) -> None:
    decision = _try(cards, [], asked)
    assume(decision is not None)
    for loser in decision.against:
        rest = [c for c in cards if c.slug != loser]
        assert decide(rest, [], asked).winner.slug == decision.winner.slug
