"""One variant to make: what it depends on, and the work of making it."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import DatasetRecord, MergedModel, Variant
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.config.run import RunConfig
from llava_ray.models.dataset import storage_of
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration
from llava_ray.resources.devices import device_name
from llava_ray.resources.memory import peak_bytes, reset_peaks

logger = logging.getLogger(__name__)


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
        settings: dict[str, Any] = {"slug": slug, "versions": spec_for(slug).made_with()}
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
        dataset_uri=storage_of(job.dataset).uri if spec.calibrated else "",
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
        if build.found:
            return build.found
        reset_peaks(device)
        start = time.monotonic()
        elsewhere = spec.quantize(merged, build.folder, calibration, device)
        quantize_s = time.monotonic() - start
        return build.finish(
            Variant,
            device=device_name(device),
            slug=job.slug,
            method=spec.method,
            bits_per_weight=spec.measured_bits(build.folder),
            quantize_s=round(quantize_s, 3),
            peak_memory_bytes=elsewhere or peak_bytes(device),
            estimated_bytes=estimated_bytes,
        )
