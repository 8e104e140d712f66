"""Fold an adapter into its base in fp32 and measure what that changes."""

import logging

from llava_ray.artifacts.records import AdapterCheckpoint, MergedModel
from llava_ray.artifacts.store import ArtifactStore, artifact_id
from llava_ray.config.run import RunConfig
from llava_ray.errors import ResourceError, VariantError
from llava_ray.merge.fold import merge_task
from llava_ray.models.folder import model_folder
from llava_ray.resources.capacity import Resources, free_nodes
from llava_ray.resources.tasks import Task, run_task

logger = logging.getLogger(__name__)

_MEMORY_PER_WEIGHT_BYTES = 5
"""fp32, and room for the logits and the copy that is written."""


def run(config: RunConfig, adapter: AdapterCheckpoint) -> MergedModel:
    """Merge in a Ray task on a machine with enough memory, and return the plain model.

    Raises ResourceError when no machine of the cluster has that memory, ArtifactError when the
    base is not the one that the adapter was trained on.
    """
    store = ArtifactStore(config.storage.uri)
    settings = config.merge.model_dump(mode="json")
    id = artifact_id(MergedModel.kind, settings, [adapter.id])
    found = store.find(MergedModel, id)
    if found is not None:
        logger.info("merge: %s is there already", id)
        return found
    arguments = (config, adapter, id, store.storage.uri)
    try:
        record = run_task(Task(f"merge {id}", _resources(config), merge_task, arguments))
    except VariantError as error:
        raise ResourceError(f"merge: {error}") from error
    logger.info(
        "merge: largest logit difference %.2e in fp32, %.2e once rounded to %s",
        record.max_logit_difference, record.rounded_max_logit_difference, config.merge.dtype,
    )  # fmt: skip
    return record


def merge_memory_bytes(weight_bytes: int) -> int:
    """Return the memory that merging takes on one machine, by the bytes of 16-bit weights."""
    return weight_bytes // 2 * _MEMORY_PER_WEIGHT_BYTES


def _resources(config: RunConfig) -> Resources:
    folder = model_folder(config.model)
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    nodes = free_nodes()
    cpus = max((node.num_cpus for node in nodes), default=1)
    gpus = any(node.num_gpus >= 1 for node in nodes)
    need = Resources(
        # Half of a machine: a waiting replica or trial may have the rest.
        num_cpus=max(1, min(8, cpus // 2)),
        num_gpus=1 if gpus else 0,
        memory_bytes=merge_memory_bytes(weight_bytes),
    )
    if lack := need.shortage(nodes):
        raise ResourceError(f"merging in fp32: {lack}")
    return need
