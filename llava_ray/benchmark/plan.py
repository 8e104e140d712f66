"""What shapes every measurement, and the held-out samples it is made on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.config.run import BenchmarkConfig, RunConfig
from llava_ray.errors import ConfigError, DataError, ResourceError
from llava_ray.models.conversation import Sample, read_samples


@dataclass(frozen=True)
class Plan:
    """What a worker needs beside the records."""

    run: RunConfig
    device: str
    """`cpu` or `cuda`."""

    @property
    def config(self) -> BenchmarkConfig:
        """The benchmark's own section."""
        return self.run.benchmark

    @property
    def num_cpus(self) -> float:
        """As many as a replica of the endpoint has, so the speed is that of what is served."""
        return self.run.serve.cpus_per_replica

    @property
    def num_gpus(self) -> int:
        """A whole GPU, so that nothing else runs on it."""
        return 1 if self.device == "cuda" else 0

    def reference_settings(self) -> dict[str, Any]:
        """Return what shapes the baseline's log probabilities."""
        return {
            "fidelity_samples": self.config.fidelity_samples,
            "device": self.device,
            "system_prompt": self.run.model.system_prompt,
            "max_length": self.run.train.max_length,
        }

    def settings(self) -> dict[str, Any]:
        """Return what shapes a scorecard."""
        measured = self.config.model_dump(mode="json", exclude={"max_parallel"})
        return {**measured, **self.reference_settings(), "num_cpus": self.num_cpus}


def make_plan(config: RunConfig, cluster: dict[str, float]) -> Plan:
    """Settle the device by the cluster's resources, as `ray.cluster_resources()` gives them.

    Raises ResourceError where the cluster has not what is asked for.
    """
    device, cpus = config.benchmark.device, config.serve.cpus_per_replica
    if device == "auto":
        device = "cuda" if cluster.get("GPU", 0) >= 1 else "cpu"
    if device == "cuda" and cluster.get("GPU", 0) < 1:
        raise ResourceError(
            "benchmark.device=cuda: the cluster has no whole GPU; add one or set it to cpu"
        )
    if cluster.get("CPU", 0) < cpus:
        raise ResourceError(
            f"serve.cpus_per_replica={cpus:g}: the cluster has {cluster.get('CPU', 0):g} CPUs, "
            "and the benchmark measures with as many as a replica gets"
        )
    return Plan(config, device)


def held_out(folder: Path, count: int) -> list[Sample]:
    """Return the first samples of the held-out split.

    Raises DataError when there are none.
    """
    samples = read_samples(folder / "test.json")[:count]
    if not samples:
        raise DataError(f"{folder}: the held-out split is empty; raise data.test_share")
    return samples


def check_dataset(dataset: DatasetRecord) -> None:
    """Raise ConfigError where nothing is held out, before a worker starts."""
    if dataset.num_test == 0:
        raise ConfigError(f"{dataset.id}: no held-out samples to measure on; raise data.test_share")
