"""Fold an adapter into its base in fp32 and measure what that changes."""

import logging
from dataclasses import replace

from llava_ray.artifacts.identity import artifact_id, versions
from llava_ray.artifacts.records import AdapterCheckpoint, MergedModel
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig
from llava_ray.errors import ResourceError, VariantError
from llava_ray.merge.fold import merge_task
from llava_ray.models.folder import model_folder
from llava_ray.models.tensors import stored_bytes
from llava_ray.resources.capacity import Fleet, Resources, find_fleet
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
    libraries = {"versions": versions("torch", "transformers", "peft")}
    settings = {**config.merge.model_dump(mode="json"), **libraries}
    id = artifact_id(MergedModel.kind, settings, [adapter.id])
    found = store.find(MergedModel, id)
    if found is not None:
        logger.info("merge: %s is there already", id)
        return found
    folder = model_folder(config.model)
    weight_bytes = stored_bytes(folder)
    need = merge_resources(weight_bytes, find_fleet(config))
    task = Task(f"merge {id}", need, merge_task, (config, adapter, id, store.storage.uri))
    try:
        record = run_task(task, wait_s=config.resources.wait_s)
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


def merge_resources(weight_bytes: int, fleet: Fleet) -> Resources:
    """Return what merging asks for: of one kind of node, with a GPU where such a node has memory.

    weight_bytes: of 16-bit weights. Raises ResourceError when no node can have that memory.
    """
    need = Resources(num_gpus=int(fleet.gpu), memory_bytes=merge_memory_bytes(weight_bytes))
    fitting = [node for node in fleet.types if node.room_for(need)]
    if not fitting and fleet.complete:
        need = replace(need, num_gpus=0)
        fitting = [node for node in fleet.types if node.room_for(need)]
    fleet.check("merging in fp32", need)
    # Half of a machine: a waiting replica or trial may have the rest.
    half = max((node.each.num_cpus // 2 for node in fitting), default=1)
    return replace(need, num_cpus=max(1, min(8, half)))
