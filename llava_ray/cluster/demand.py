"""What a job's stages ask of a cluster, by its config alone."""

from dataclasses import dataclass
from pathlib import Path

from llava_ray.cluster.groups import NodeGroup
from llava_ray.config.run import RunConfig
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for

LLAVA_7B_BYTES = 14_128_000_000
"""Weights of llava-1.5-7b-hf in fp16; assumed for a model that is not on this disk."""


@dataclass(frozen=True)
class Demand:
    """`count` pieces of work at a time, each on one node."""

    what: str
    cpus: float
    gpus: float
    memory_bytes: float
    count: int = 1

    def per_node(self, group: NodeGroup) -> int:
        """Return how many fit on one node; memory counts where the group names it."""
        fits = [10**6]
        if self.cpus:
            fits.append(int(group.cpus / self.cpus + 1e-6))
        if self.gpus:
            fits.append(int(group.gpus / self.gpus + 1e-6))
        if self.memory_bytes and group.memory_bytes:
            fits.append(int(group.memory_bytes / self.memory_bytes + 1e-6))
        return min(fits)

    def describe(self) -> str:
        """Name the resources."""
        parts = [f"{self.cpus:g} CPUs"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory_bytes / 2**30:.1f} GiB"] if self.memory_bytes else []
        return ", ".join(parts)


def demands_of(config: RunConfig, *, gpu: bool) -> list[Demand]:
    """Return what train, quantize and serve ask for on a cluster with or without GPUs.

    Raises ConfigError for an unknown variant.
    """
    train, serve = config.train, config.serve
    serve_gpus = serve.gpus_per_replica
    demands = [
        Demand(
            "train",
            cpus=train.cpus_per_worker or (4 if gpu else 1),
            gpus=1 if gpu else 0,
            memory_bytes=0,
            count=train.num_workers or 1,
        )
    ]
    for slug in dict.fromkeys(config.quantize.variants):
        need = spec_for(slug).resources(model_bytes(config), gpu=gpu)
        demands.append(Demand(f"quantize {slug}", need.num_cpus, need.num_gpus, need.memory_bytes))
    demands.append(
        Demand(
            "serve",
            cpus=serve.cpus_per_replica,
            gpus=(1 if gpu else 0) if serve_gpus is None else serve_gpus,
            memory_bytes=0,
            count=serve.max_replicas,
        )
    )
    return demands


def model_bytes(config: RunConfig) -> int:
    """Return the size of the base model's weights."""
    folder = EMBEDDED if config.model.path == "embedded" else Path(config.model.path).expanduser()
    found = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return found or LLAVA_7B_BYTES
