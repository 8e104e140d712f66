"""How far a variant's predictions are from the baseline's, on the same tokens and pixels."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llava_ray.artifacts.records import Frozen, Spread

if TYPE_CHECKING:
    import torch

DRAWS = 2000


class SampleFidelity(Frozen):
    """Sums over the caption tokens of one sample."""

    tokens: int
    kl_sum: float
    """KL(baseline || variant) in nats."""
    nll_sum: float
    """Negative log likelihood of the caption, nats."""
    top1_matches: int


class Fidelity(Frozen):
    """Means over all tokens of all samples."""

    kl_divergence: Spread
    top1_agreement: float
    perplexity: float


def compare(
    reference: "torch.Tensor",
    top1: "torch.Tensor",
    logits: "torch.Tensor",
    continuation: "torch.Tensor",
) -> SampleFidelity:
    """Sum up one sample.

    reference: the baseline's log probabilities, [tokens, vocab], in half precision; they are
    normalized again, so the divergence is that of two distributions and never below 0.
    top1: its likeliest tokens, from before the rounding. logits: the variant's, [tokens, vocab].
    continuation: the caption. top1 and continuation are int64 [tokens].
    """
    import torch

    expected = torch.log_softmax(reference.float(), dim=-1)
    found = torch.log_softmax(logits.float(), dim=-1)
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    likelihood = found.gather(-1, continuation.unsqueeze(-1))
    return SampleFidelity(
        tokens=len(continuation),
        kl_sum=float(divergence.double().sum()),
        nll_sum=float(-likelihood.double().sum()),
        top1_matches=int((logits.argmax(dim=-1) == top1).sum()),
    )


def summarize(samples: Sequence[SampleFidelity]) -> Fidelity:
    """Average over tokens, with a 95% interval of the divergence by bootstrap over samples.

    The draws are the same for every variant, so intervals of two variants are paired.
    """
    tokens = np.array([sample.tokens for sample in samples], dtype=np.float64)
    total = tokens.sum()
    mean_nll = sum(sample.nll_sum for sample in samples) / total
    return Fidelity(
        kl_divergence=_bootstrap(np.array([sample.kl_sum for sample in samples]), tokens),
        top1_agreement=sum(sample.top1_matches for sample in samples) / total,
        perplexity=math.exp(min(mean_nll, 700.0)),
    )


def paired_difference(a: Sequence[SampleFidelity], b: Sequence[SampleFidelity]) -> Spread:
    """Return KL of `a` minus that of `b` on the same samples, with a 95% interval."""
    differences = [x.kl_sum - y.kl_sum for x, y in zip(a, b, strict=True)]
    return _bootstrap(np.array(differences), np.array([x.tokens for x in a], dtype=np.float64))


def _bootstrap(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> Spread:
    rows = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    low, high = np.quantile(sums[rows].sum(axis=1) / tokens[rows].sum(axis=1), (0.025, 0.975))
    mean = float(sums.sum() / tokens.sum())
    return Spread(median=mean, low=float(low), high=float(high), repeats=len(sums))
