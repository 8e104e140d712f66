"""Make every variant asked for, each in a Ray task of its own; one that fails stops no other."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import (
    DatasetRecord,
    MergedModel,
    QuantizationRun,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig
from llava_ray.console import Progress
from llava_ray.errors import ResourceError
from llava_ray.quantize.job import Job, make_variant
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.capacity import find_fleet
from llava_ray.resources.tasks import Task, run_side_by_side

logger = logging.getLogger(__name__)

Outcome = Variant | VariantFailure


def run(config: RunConfig, merged: MergedModel, dataset: DatasetRecord) -> list[Outcome]:
    """Return a record per slug of quantize.variants, in that order.

    Finished variants are found, failed ones tried again. Raises ConfigError for an unknown slug.
    """
    slugs = tuple(dict.fromkeys(config.quantize.variants))
    jobs = {slug: Job.plan(config, slug, merged, dataset) for slug in slugs}
    store = ArtifactStore(config.storage.uri)
    found = {slug: store.find(Variant, job.artifact_id) for slug, job in jobs.items()}
    for slug in (slug for slug, variant in found.items() if variant):
        logger.info("%s: found, made before", slug)
    missing = [jobs[slug] for slug, variant in found.items() if not variant]
    made = _make_all(config, store, missing) if missing else {}
    return [found[slug] or made[slug] for slug in slugs]


def _make_all(config: RunConfig, store: ArtifactStore, jobs: list[Job]) -> dict[str, Outcome]:
    """Run the jobs in parallel and record how long they took together and apart."""
    slugs = [job.slug for job in jobs]
    # Of a run, not of its inputs: what failed in one is tried again by the next.
    settings = {"variants": slugs, "started": datetime.now(UTC).isoformat()}
    run_id = artifact_id(QuantizationRun.kind, settings, [jobs[0].merged.id])
    with store.build(
        QuantizationRun, run_id, settings=settings, parents=[jobs[0].merged.id]
    ) as build:
        outcomes: dict[str, Outcome] = {}
        progress = Progress("quantize", len(jobs), "variants", every_s=0)
        for outcome in _outcomes(config, jobs):
            outcomes[outcome.slug] = outcome
            if isinstance(outcome, VariantFailure):
                logger.warning("%s failed: %s", outcome.slug, outcome.reason)
                progress.at(len(outcomes))
            else:
                size, wall_s = outcome.size_bytes / 1e6, outcome.wall_s
                progress.at(len(outcomes), f"{outcome.slug} has {size:.1f} MB in {wall_s:.1f} s")
        made = [outcome for outcome in outcomes.values() if isinstance(outcome, Variant)]
        record = build.finish(
            QuantizationRun,
            device=made[0].device if made else "none",
            variant_wall_s={variant.slug: variant.wall_s for variant in made},
            failures=tuple(o for o in outcomes.values() if isinstance(o, VariantFailure)),
        )
    logger.info(
        "%d variants in %.1f s; one after the other they take %.1f s",
        len(made),
        record.wall_s,
        record.sum_s,
    )
    return outcomes


def _outcomes(config: RunConfig, jobs: list[Job]) -> Iterator[Outcome]:
    """Yield each job's outcome as it comes; what no node can hold fails at once."""
    fleet = find_fleet(config)
    tasks = []
    # Calibrating takes longest, so it starts first and the others run beside it.
    for job in sorted(jobs, key=lambda job: not spec_for(job.slug).calibrated):
        need = spec_for(job.slug).resources(job.merged.size_bytes, gpu=fleet.gpu)
        try:
            need = fleet.fit("it", need)
        except ResourceError as error:
            yield VariantFailure(slug=job.slug, reason=str(error))
            continue
        device = "cuda" if need.num_gpus else "cpu"
        tasks.append(Task(job.slug, need, make_variant, (job, device)))
    for task, outcome in run_side_by_side(
        tasks, at_once=config.quantize.max_parallel, wait_s=config.resources.wait_s
    ):
        if isinstance(outcome, Variant):
            yield outcome
        else:
            yield VariantFailure(slug=task.name, reason=" ".join(str(outcome).split()))
