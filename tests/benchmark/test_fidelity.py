"""KL divergence, agreement and perplexity, against figures by hand."""

import math

import pytest
import torch

from llava_ray.benchmark.fidelity import SampleFidelity, paired_difference, summarize
from llava_ray.benchmark.reference import compare


def test_compare_sums_what_the_formulas_say() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    found = compare(p.log(), p.argmax(-1), q.log() + 3.0, torch.tensor([0, 2]))
    assert found.tokens == 2
    assert found.kl_sum == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-6)
    assert found.nll_sum == pytest.approx(-math.log(0.25) - math.log(0.8), abs=1e-6)
    assert found.top1_matches == 1


def test_half_precision_costs_less_than_a_hundred_thousandth_of_a_nat() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, 4096)
    stored = torch.log_softmax(logits, dim=-1).half()
    found = compare(stored, logits.argmax(-1), logits, torch.zeros(64, dtype=torch.long))
    assert 0 <= found.kl_sum / 64 < 1e-5


def test_a_ruled_out_token_of_the_baseline_adds_nothing() -> None:
    reference = torch.tensor([[0.0, -60000.0]])
    found = compare(reference, torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0]))
    assert found.kl_sum == pytest.approx(math.log(2), abs=1e-6)


def _sample(tokens: int, kl: float) -> SampleFidelity:
    return SampleFidelity(tokens=tokens, kl_sum=kl * tokens, nll_sum=tokens * 0.7, top1_matches=1)


def test_long_samples_weigh_by_their_tokens() -> None:
    fidelity = summarize([_sample(10, 0.1), _sample(30, 0.5)])
    assert fidelity.kl_divergence.median == pytest.approx(0.4)
    assert fidelity.kl_divergence.repeats == 2
    assert fidelity.top1_agreement == 2 / 40
    assert fidelity.perplexity == pytest.approx(math.exp(0.7))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        draws = torch.randn(40, generator=generator).abs().tolist()
        spread = summarize([_sample(10, kl) for kl in draws]).kl_divergence
        covered += spread.low <= math.sqrt(2 / math.pi) <= spread.high
    assert 86 <= covered <= 99


def test_all_variants_get_the_same_draws() -> None:
    kls = [0.1, 0.2, 0.7, 0.4, 0.3]
    one = summarize([_sample(10, kl) for kl in kls]).kl_divergence
    double = summarize([_sample(10, 2 * kl) for kl in kls]).kl_divergence
    assert (double.low, double.high) == pytest.approx((2 * one.low, 2 * one.high))


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    kls = [0.1, 0.9, 0.3, 0.7, 0.2, 0.6]
    a, b = [_sample(10, kl + 0.05) for kl in kls], [_sample(10, kl) for kl in kls]
    difference = paired_difference(a, b)
    assert (difference.low, difference.high) == pytest.approx((0.05, 0.05))
    assert summarize(a).kl_divergence.low < summarize(b).kl_divergence.high
