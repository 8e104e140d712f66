"""What a job's stages ask of a cluster, by its config alone."""

from dataclasses import dataclass
from pathlib import Path

from llava_ray.config.run import RunConfig
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.capacity import Resources

LLAVA_7B_BYTES = 14_128_000_000
"""Weights of llava-1.5-7b-hf in fp16; assumed for a model that is not on this disk."""


@dataclass(frozen=True)
class Demand:
    """`count` pieces of work at a time, each on one node."""

    what: str
    each: Resources
    count: int = 1


def demands_of(config: RunConfig, *, gpu: bool) -> list[Demand]:
    """Return what train, quantize and serve ask for on a cluster with or without GPUs.

    Raises ConfigError for an unknown variant.
    """
    train, serve, gpus = config.train, config.serve, 1 if gpu else 0
    worker = Resources(train.cpus_per_worker or (4 if gpu else 1), gpus)
    served = serve.gpus_per_replica
    replica = Resources(serve.cpus_per_replica, gpus if served is None else served)
    return [
        Demand("train", worker, train.num_workers or 1),
        *(
            Demand(f"quantize {slug}", spec_for(slug).resources(model_bytes(config), gpu=gpu))
            for slug in dict.fromkeys(config.quantize.variants)
        ),
        Demand("serve", replica, serve.max_replicas),
    ]


def model_bytes(config: RunConfig) -> int:
    """Return the size of the base model's weights."""
    folder = EMBEDDED if config.model.path == "embedded" else Path(config.model.path).expanduser()
    found = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return found or LLAVA_7B_BYTES
