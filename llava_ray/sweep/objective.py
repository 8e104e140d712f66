"""What a sweep minimizes: `eval_loss`, or how far captions are from the best score there is."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError

Scorer = Callable[[RunConfig, DatasetRecord, str, int], float]
"""A function of a trial's config, the data set, a checkpoint's path and its step; smaller is
better."""

BEST_SCORES = {"rouge_l": 1.0, "cider_d": 10.0, "word_recall": 1.0, "character_error_rate": 0.0}
"""The value that perfect captions have in each score."""


@dataclass(frozen=True)
class Objective:
    """The two parts of sweep.objective."""

    measure: str
    """`eval_loss` or a caption score."""
    slug: str | None
    """The variant that a trial's model is made into before its captions are scored."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `eval_loss`, `<caption score>` or `<caption score> after <variant slug>`.

        Raises ConfigError that names the nearest score.
        """
        measure, after, slug = (part.strip() for part in text.partition(" after "))
        if text == "eval_loss" or (measure in BEST_SCORES and bool(slug) == bool(after)):
            return cls(measure, slug or None)
        near = difflib.get_close_matches(measure, ["eval_loss", *BEST_SCORES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != measure else ""
        raise ConfigError(
            f"sweep.objective {text!r}: {hint}use eval_loss, or one of {', '.join(BEST_SCORES)}, "
            "each with ' after <variant slug>' if it is to be scored as that variant"
        )

    @property
    def label(self) -> str:
        """What is minimized, in words."""
        best = BEST_SCORES.get(self.measure, 0.0)
        text = f"{best:g} - {self.measure}" if best else self.measure
        return f"{text} after {self.slug}" if self.slug else text

    def loss(self, score: float) -> float:
        """Return what a caption score lacks; smaller is better."""
        return abs(BEST_SCORES[self.measure] - score)
