"""What shapes every measurement, and the held-out samples it is made on."""

from dataclasses import dataclass
from typing import Any

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import DatasetRecord, ReferenceScores, Variant
from llava_ray.config.run import BenchmarkConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.conversation import Sample
from llava_ray.models.dataset import open_split
from llava_ray.resources.capacity import Fleet, Resources


@dataclass(frozen=True)
class Plan:
    """What a worker needs beside the records."""

    run: RunConfig
    device: str
    """`cpu` or `cuda`."""
    model: str = ""
    """A part of the device's name that it must have; empty: any."""

    @property
    def config(self) -> BenchmarkConfig:
        """The benchmark's own section."""
        return self.run.benchmark

    @property
    def num_cpus(self) -> float:
        """As many as a replica of the endpoint has, so the speed is that of what is served."""
        return self.run.serve.cpus_per_replica

    @property
    def resources(self) -> Resources:
        """What a measurement asks for: a whole GPU, so that nothing else runs on it."""
        return Resources(self.num_cpus, 1 if self.device == "cuda" else 0)

    def reference_settings(self) -> dict[str, Any]:
        """Return what shapes the baseline's log probabilities."""
        return {
            "fidelity_samples": self.config.fidelity_samples,
            "device": self.device,
            "system_prompt": self.run.model.system_prompt,
            "max_length": self.run.train.max_length,
        }

    def reference_id(self, baseline: Variant, dataset: DatasetRecord) -> str:
        """Return the id of those log probabilities."""
        parents = (baseline.id, dataset.id)
        return artifact_id(ReferenceScores.kind, self.reference_settings(), parents)

    def settings(self) -> dict[str, Any]:
        """Return what shapes a scorecard."""
        measured = self.config.model_dump(mode="json", exclude={"device", "max_parallel"})
        return {**measured, **self.reference_settings(), "num_cpus": self.num_cpus}


def make_plan(config: RunConfig, fleet: Fleet) -> Plan:
    """Settle the device by the nodes that there can be."""
    wanted = config.benchmark.device
    if wanted in ("cpu", "cuda"):
        return Plan(config, wanted)
    return Plan(config, "cuda" if fleet.gpu else "cpu", "" if wanted == "auto" else wanted)


def is_model(name: str, wanted: str) -> bool:
    """Tell whether a device of this name is one of those wanted."""
    return wanted.casefold() in name.casefold()


def check_room(plan: Plan, fleet: Fleet) -> None:
    """Raise ResourceError where no node can have what a measurement takes."""
    what = f"benchmark.device={plan.device} with serve.cpus_per_replica={plan.num_cpus:g}"
    fleet.check(what, plan.resources)


def held_out(dataset: DatasetRecord, count: int) -> list[Sample]:
    """Return the first samples of the held-out split, with their pictures.

    Raises DataError where there is none.
    """
    samples = open_split(dataset, "test").first(count)
    if not samples:
        raise DataError(f"{dataset.uri}: the held-out split is empty; raise data.test_share")
    return samples


def check_dataset(dataset: DatasetRecord) -> None:
    """Raise ConfigError where nothing is held out, before a worker starts."""
    if dataset.num_test == 0:
        raise ConfigError(
            f"{dataset.id}: no held-out samples to measure on: data.test_share leaves none, or all "
            "rows show the same picture"
        )
