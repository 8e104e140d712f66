"""What a report is made from: measurements, the choice and the records behind them."""

from dataclasses import dataclass

from llava_ray.artifacts.records import (
    DatasetRecord,
    MergedModel,
    QuantizationRun,
    Scorecard,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore, read_record
from llava_ray.benchmark.fidelity import SampleFidelity, read_fidelity
from llava_ray.config.run import RunConfig


@dataclass(frozen=True)
class Findings:
    """Measurements, the choice and why."""

    config: RunConfig
    scorecards: tuple[Scorecard, ...]
    failures: tuple[VariantFailure, ...]
    winner: Scorecard
    reasons: tuple[str, ...]
    """Why the winner won."""
    against: dict[str, str]
    """By slug of every other variant, the failed included: why not."""

    @property
    def baseline(self) -> Scorecard | None:
        """Return the baseline's scorecard; None where it could not be measured."""
        baseline = self.config.benchmark.baseline
        return next((card for card in self.scorecards if card.slug == baseline), None)


@dataclass(frozen=True)
class Origins:
    """The records behind the scorecards."""

    dataset: DatasetRecord
    variants: dict[str, Variant]
    fidelity: dict[str, list[SampleFidelity]]
    """By slug, per held-out sample."""
    merged: MergedModel | None
    """None where the variants were not made from a merged model of this storage."""
    quantization: QuantizationRun | None
    """The run that made most of them."""


def find_origins(findings: Findings) -> Origins:
    """Read the manifests of data set, variants and merged model.

    Raises ArtifactError when one that a scorecard names is gone.
    """
    cards = findings.scorecards
    variants = {card.slug: read_record(Variant, card.variant_uri) for card in cards}
    store = ArtifactStore(findings.config.storage.uri)
    parents = variants[findings.winner.slug].parents
    merged = (store.find(MergedModel, name) for name in parents if name.startswith("merged-"))
    runs = [run for run in store.find_all(QuantizationRun) if set(run.parents) & set(parents)]
    return Origins(
        dataset=read_record(DatasetRecord, findings.winner.dataset_uri),
        variants=variants,
        fidelity={card.slug: read_fidelity(card) for card in cards},
        merged=next(merged, None),
        quantization=max(runs, key=lambda run: len(run.variant_wall_s), default=None),
    )
