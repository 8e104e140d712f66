"""Choose the variant to serve, and write the report beside the choice."""

from collections.abc import Sequence

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import ChosenVariant, Scorecard, VariantFailure
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.choose.decision import decide
from llava_ray.config.run import RunConfig
from llava_ray.report import write_report


def run(
    config: RunConfig, scorecards: Sequence[Scorecard], failures: Sequence[VariantFailure]
) -> ChosenVariant:
    """Return the winner's record; report.html, report.md and cards/ lie in its folder.

    Raises ConfigError with every variant's reason when none keeps the limits.
    """
    findings = decide(scorecards, failures, config)
    store = ArtifactStore(config.storage.uri)
    settings = {
        **config.choose.model_dump(mode="json"),
        "baseline": config.benchmark.baseline,
        "failures": {failure.slug: failure.reason for failure in failures},
    }
    parents = tuple(sorted(card.id for card in scorecards))
    name = artifact_id(ChosenVariant.kind, settings, parents)
    found = store.find(ChosenVariant, name)
    if found is not None:
        return found
    with store.build(ChosenVariant, name, settings=settings, parents=parents) as build:
        if build.found:
            return build.found
        write_report(build.folder, findings)
        return build.finish(
            ChosenVariant,
            device=findings.winner.device,
            slug=findings.winner.slug,
            variant_uri=findings.winner.variant_uri,
            reasons=findings.reasons,
            against=findings.against,
        )
