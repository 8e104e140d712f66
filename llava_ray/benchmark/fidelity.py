"""How far a variant's predictions are from the baseline's, on the same tokens and pixels."""

import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava_ray.artifacts.records import Frozen, Scorecard, Spread
from llava_ray.artifacts.store import local_folder

FIDELITY_FILE = "fidelity.json"
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


def read_fidelity(card: Scorecard) -> list[SampleFidelity]:
    """Return the sums per held-out sample that lie beside a scorecard."""
    text = (local_folder(card) / FIDELITY_FILE).read_text(encoding="utf-8")
    return [SampleFidelity.model_validate(row) for row in json.loads(text)]


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
