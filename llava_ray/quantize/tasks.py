"""One variant in a Ray task: what it is told, what it does, and how a failure is told."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.artifacts.records import DatasetRecord, MergedModel, Variant
from llava_ray.artifacts.store import ArtifactStore, artifact_id, local_folder
from llava_ray.config.run import RunConfig
from llava_ray.errors import LlavaRayError, VariantError
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration, Resources
from llava_ray.resources.capacity import free_nodes
from llava_ray.resources.crash import failure_reason
from llava_ray.resources.devices import device_name
from llava_ray.resources.forked import run_forked
from llava_ray.resources.memory import peak_bytes, reset_peaks

logger = logging.getLogger(__name__)

_POLL_S = 5.0


@dataclass(frozen=True)
class Job:
    """One variant to make."""

    slug: str
    merged: MergedModel
    dataset: DatasetRecord
    storage_uri: str
    settings: dict[str, Any]
    parents: tuple[str, ...]

    @classmethod
    def plan(
        cls, config: RunConfig, slug: str, merged: MergedModel, dataset: DatasetRecord
    ) -> "Job":
        """Collect what shapes the variant; calibration counts only where a method looks at it."""
        settings: dict[str, Any] = {"slug": slug}
        parents: tuple[str, ...] = (merged.id,)
        if spec_for(slug).calibrated:
            settings["calibration_samples"] = config.quantize.calibration_samples
            settings["system_prompt"] = config.model.system_prompt
            parents = (merged.id, dataset.id)
        return cls(slug, merged, dataset, config.storage.uri, settings, parents)

    @property
    def artifact_id(self) -> str:
        """The variant's id."""
        return artifact_id(Variant.kind, self.settings, self.parents)


def make_variant(job: Job, device: str) -> Variant:
    """Quantize in this process on `cpu` or `cuda`, and seal the variant's folder."""
    spec = spec_for(job.slug)
    merged = local_folder(job.merged)
    calibration = Calibration(
        dataset_folder=local_folder(job.dataset) if spec.calibrated else Path(),
        num_samples=job.settings.get("calibration_samples", 0),
        system_prompt=job.settings.get("system_prompt", ""),
    )
    estimated_bytes = spec.estimated_bytes(merged)
    logger.info(
        "%s: starts on %s, about %.1f MB at %.2f bits per quantized weight",
        job.slug,
        device,
        estimated_bytes / 1e6,
        spec.bits_per_weight(),
    )
    store = ArtifactStore(job.storage_uri)
    with store.build(Variant, job.artifact_id, settings=job.settings, parents=job.parents) as build:
        reset_peaks(device)
        start = time.monotonic()
        phases = spec.quantize(merged, build.folder, calibration, device)
        quantize_s = time.monotonic() - start
        elsewhere = phases.peak_memory_bytes if phases else None
        return build.finish(
            Variant,
            device=device_name(device),
            slug=job.slug,
            method=spec.method,
            bits_per_weight=spec.bits_per_weight(),
            quantize_s=round(quantize_s, 3),
            peak_memory_bytes=elsewhere or peak_bytes(device),
            estimated_bytes=estimated_bytes,
        )


def run_remotely(job: Job, *, gpu: bool, placement_timeout_s: float) -> Variant:
    """Run `make_variant` as a Ray task with the method's resources.

    Raises LlavaRayError that says in one line why there is no variant.
    """
    import ray

    spec = spec_for(job.slug)
    need = fitted(spec.resources(job.merged.size_bytes, gpu=gpu), free_nodes())
    remote: Any = ray.remote(_run_apart).options(
        name=f"quantize {job.slug}",
        num_cpus=need.num_cpus,
        num_gpus=need.num_gpus,
        memory=need.memory_bytes,
        max_retries=1,
    )
    name = f"quantize-{job.slug}-{secrets.token_hex(4)}"
    ref = remote.remote(name, make_variant, job)
    deadline = time.monotonic() + placement_timeout_s
    poll_s = min(_POLL_S, placement_timeout_s / 2 + 0.1)
    while not ray.wait([ref], timeout=poll_s)[0]:
        if time.monotonic() < deadline:
            continue
        if lack := shortage(need, free_nodes()):
            ray.cancel(ref)
            raise LlavaRayError(lack)
    try:
        result: Variant = ray.get(ref)
    except ray.exceptions.RayError as error:
        raise VariantError(failure_reason(error)) from error
    return result


def _run_apart(name: str, work: Callable[[Job, str], Variant], job: Job) -> Variant:
    import ray

    gpu = ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return run_forked(name, work, job, "cuda" if gpu else "cpu")


def fitted(need: Resources, nodes: list[dict[str, float]]) -> Resources:
    """Lower the CPUs asked for to what the largest node has: fewer CPUs only take longer."""
    most = max((node.get("CPU", 0) for node in nodes), default=0)
    if most < 1:
        return need
    return Resources(min(need.num_cpus, most), need.num_gpus, need.memory_bytes)


def shortage(need: Resources, nodes: list[dict[str, float]]) -> str | None:
    """Say what no node has enough of, or None where one could run the task."""
    wanted = {"CPU": need.num_cpus, "GPU": need.num_gpus, "memory": float(need.memory_bytes)}
    if any(all(node.get(key, 0) >= value for key, value in wanted.items()) for node in nodes):
        return None
    largest = max(nodes, key=lambda node: [node.get(key, 0) for key in ("GPU", "memory", "CPU")])
    return (
        f"no node has {_resources_text(wanted)}; the largest has {_resources_text(largest)}: "
        "add a node or leave this variant out of quantize.variants"
    )


def _resources_text(values: dict[str, float]) -> str:
    memory = values.get("memory", 0) / 2**30
    cpus, gpus = values.get("CPU", 0), values.get("GPU", 0)
    return f"{cpus:g} CPUs, {gpus:g} GPUs and {memory:.1f} GiB of memory"
