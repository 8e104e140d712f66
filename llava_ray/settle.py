"""What a config leaves open, settled by the nodes that its cluster can have.

So the same command comes to the same artifacts, whichever nodes are up at the moment.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.benchmark import plan as benchmark
from llava_ray.cluster.groups import node_types, read_groups
from llava_ray.cluster.local import NODE_TYPES
from llava_ray.config.run import RunConfig, changed
from llava_ray.dry_run import find_base
from llava_ray.errors import LlavaRayError, ResourceError, said_by
from llava_ray.merge import merge_resources
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.capacity import Fleet
from llava_ray.train.resources import default_workers, plan_workers

logger = logging.getLogger(__name__)

LARGE_BYTES = 2 * 2**30
"""Weights of a model that is not trained on CPUs unless that is said."""


def with_node_types(config: RunConfig) -> RunConfig:
    """Return the config with resources.node_types read: a list, `up`, or None where nobody said.

    Raises ConfigError for a cluster YAML that cannot be read.
    """
    wanted = config.resources.node_types
    if wanted is None:
        # Without an address the job starts a Ray of its own.
        wanted = os.environ.get(NODE_TYPES) or (None if os.environ.get("RAY_ADDRESS") else "up")
    if isinstance(wanted, str) and wanted != "up":
        wanted = node_types(read_groups(Path(wanted).expanduser()))
    return changed(config, resources={"node_types": wanted})


def settle(config: RunConfig, fleet: Fleet) -> RunConfig:
    """Return the config with accelerator, workers, precision and devices filled in.

    Raises ResourceError for a large model whose cluster has no GPUs, unless CPUs are asked for.
    """
    fleet = replace(fleet, accelerator=config.resources.accelerator)
    fleet = replace(fleet, accelerator=_accelerator(config, fleet))
    if not fleet.complete and config.train.num_workers is None:
        logger.info("train.num_workers=1: set it, or resources.node_types, for more")
    train: dict[str, Any] = {"num_workers": config.train.num_workers or default_workers(fleet)}
    measured = benchmark.make_plan(config, fleet)
    if config.train.precision == "auto":
        train["precision"] = "bf16" if fleet.gpu else "fp32"
    return changed(
        config,
        resources={"accelerator": fleet.accelerator},
        train=train,
        benchmark={"device": measured.model or measured.device},
        serve={"gpus_per_replica": fleet.gpus_per_replica(config.serve)},
    )


def shortages(config: RunConfig, fleet: Fleet) -> Iterator[str]:
    """Yield what the stages will ask for that no node of a complete fleet can ever hold."""
    try:
        config = settle(config, fleet)
        plan_workers(config.train, fleet)
    except LlavaRayError as error:
        yield f"nothing can train here: {error}"
    yield from said_by(_demands(config, fleet))


def _demands(config: RunConfig, fleet: Fleet) -> Iterator[Callable[[], object]]:
    base = find_base(config)
    if base.weight_bytes is not None:
        yield functools.partial(merge_resources, base.weight_bytes, fleet)
    merged = base.merged_bytes(config.merge.dtype) or 0
    for slug in dict.fromkeys(config.quantize.variants):
        need = spec_for(slug).resources(merged, gpu=fleet.gpu)
        yield functools.partial(fleet.fit, f"quantize {slug}", need)
    yield lambda: benchmark.check_room(benchmark.make_plan(config, fleet), fleet)
    yield lambda: fleet.check_replicas(config.serve, config.serve.max_replicas)


def _accelerator(config: RunConfig, fleet: Fleet) -> str:
    if config.resources.accelerator != "auto" or fleet.gpu:
        return "gpu" if fleet.gpu else "cpu"
    size = find_base(config).weight_bytes
    if size is not None and size <= LARGE_BYTES:
        return "cpu"
    if fleet.complete:
        raise ResourceError(
            f"resources.accelerator=auto: {config.model.path} is large and the cluster has no GPU, "
            f"only {fleet}: add one, or set resources.accelerator=cpu to spend days on CPUs"
        )
    return "gpu"
