"""Fine-tune LLaVA with LoRA (or whole) through Ray Train and DeepSpeed."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.artifacts.faults import patiently
from llava_ray.artifacts.identity import REVISIONS, artifact_id, versions
from llava_ray.artifacts.records import AdapterCheckpoint, DatasetRecord
from llava_ray.artifacts.store import CARD, ArtifactStore
from llava_ray.config.run import RunConfig, TrainConfig
from llava_ray.config.section import need_package
from llava_ray.models.folder import file_hashes, model_folder, weights_sha256
from llava_ray.resources.capacity import find_fleet
from llava_ray.train.card import adapter_card
from llava_ray.train.curve import draw_curve
from llava_ray.train.resources import plan_workers
from llava_ray.train.trackers import METRICS, read_metrics
from llava_ray.train.unfinished import check_origin, last_checkpoint, note, offer

if TYPE_CHECKING:
    from ray.train import Result

logger = logging.getLogger(__name__)

# These say how a run is carried out; the same run under others is the same artifact, and goes on
# where it was cut off.
_NOT_SHAPING = {
    "cpus_per_worker", "zero_stage", "offload", "eval_batch_size", "loader_workers",
    "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "checkpoints_kept",
    "max_failures", "trackers", "fused_layers",
}  # fmt: skip


LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "pillow")


def run(config: RunConfig, dataset: DatasetRecord) -> AdapterCheckpoint:
    """Train, or go on with a run that was cut off, and return the adapter.

    Raises ConfigError for a missing package or a loss that is no longer finite, DataError for
    samples that cannot be used, ResourceError where no node has room or the disk is full.
    """
    from llava_ray.train.trainer import fit, make_trainer

    train = config.train
    check_packages(train)
    store = ArtifactStore(config.storage.uri)
    settings = shaping_settings(config)
    id = artifact_id(AdapterCheckpoint.kind, settings, [dataset.id])
    found = store.find(AdapterCheckpoint, id) or _resumed(store, settings, dataset)
    if found is not None:
        logger.info("train: %s is there already", found.id)
        store.remove_work(id)
        return found
    plan = plan_workers(train, find_fleet(config))
    logger.info(
        "train: asks for %d worker(s) with %s each, and waits for nodes for %g s at most",
        plan.num_workers, plan.each, config.resources.wait_s,
    )  # fmt: skip
    work = store.work_uri(id)
    with store.build(AdapterCheckpoint, id, settings=settings, parents=[dataset.id]) as build:
        if build.found:
            return build.found
        if train.resume_from:
            check_origin(store, train.resume_from, settings, dataset.id)
        start_from = train.resume_from and last_checkpoint(store, train.resume_from)
        if not start_from:
            offer(store, id, settings, dataset.id)
        note(store, id, settings, dataset.id)
        make = partial(
            make_trainer, config, dataset, plan, run_id=id, work_uri=work, start_from=start_from
        )
        result = fit(make, train)
        local_work = Path(work) if store.storage.is_local else None
        patiently(partial(_collect, result, build.folder, local_work), work)
        metrics = result.metrics or {}
        if (adapter := build.folder / AdapterCheckpoint.peft_folder).is_dir():
            (adapter / CARD).write_text(adapter_card(config, dataset, metrics), encoding="utf-8")
        record = build.finish(
            AdapterCheckpoint,
            device=str(metrics["device"]),
            base_model=config.model.path,
            base_model_sha256=weights_sha256(model_folder(config.model)),
            dataset_uri=dataset.uri,
            num_workers=plan.num_workers,
            zero_stage=train.stage_for(plan.num_workers),
            steps=metrics["step"],
            train_loss=metrics["train_loss"],
            eval_loss=metrics.get("eval_loss"),
            samples_per_s=metrics["samples_per_s"],
            peak_memory_bytes=metrics["peak_memory_bytes"],
        )
    store.remove_work(id)
    if train.resume_from and train.resume_from != id:
        store.remove_work(train.resume_from)
    return record


def _resumed(
    store: ArtifactStore, settings: dict[str, Any], dataset: DatasetRecord
) -> AdapterCheckpoint | None:
    """Return what `--resume` made for these settings, so that nobody has to give it again."""

    def rest(settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "train": {**settings.get("train", {}), "resume_from": None}}

    if settings["train"]["resume_from"] is not None:
        return None
    return next(
        (
            record
            for record in store.find_all(AdapterCheckpoint)
            if record.parents == (dataset.id,)
            and record.code_revision == REVISIONS[AdapterCheckpoint.kind]
            and rest(record.settings) == rest(settings)
        ),
        None,
    )


def check_packages(train: TrainConfig) -> None:
    """Raise ConfigError when the package of a tracker or of the optimizer is missing."""
    for name in train.trackers:
        need_package(f"train.trackers {name!r}", name, name)
    if train.optimizer == "galore":
        need_package("train.optimizer 'galore'", "galore_torch", "llava_ray[galore]")


def seal_midway(
    config: RunConfig, dataset: DatasetRecord, checkpoint: str, step: int
) -> AdapterCheckpoint:
    """Make an adapter of a checkpoint of a run that still goes on, for a sweep to judge.

    The run must have `export_always`; `config`'s storage gets the adapter. checkpoint: its path or
    URI, taken after `step` optimizer steps.
    """
    from ray.train import Checkpoint

    from llava_ray.train.checkpoint import read_state

    store = ArtifactStore(config.storage.uri)
    # Merging reads from `train` what base the adapter was trained over.
    settings = {
        "checkpoint": checkpoint, "step": step, "train": config.train.model_dump(mode="json"),
    }  # fmt: skip
    name = artifact_id(AdapterCheckpoint.kind, settings, [dataset.id])
    with (
        store.build(AdapterCheckpoint, name, settings=settings, parents=[dataset.id]) as build,
        Checkpoint(checkpoint).as_directory() as folder,
    ):
        shutil.copytree(Path(folder) / "artifact", build.folder, dirs_exist_ok=True)
        state = read_state(Path(folder))
        assert state.loss is not None
        return build.finish(
            AdapterCheckpoint,
            device="of the trial",
            base_model=config.model.path,
            base_model_sha256=weights_sha256(model_folder(config.model)),
            dataset_uri=dataset.uri,
            steps=step,
            train_loss=state.loss,
            eval_loss=None,
            samples_per_s=state.samples_per_s,
            num_workers=len(list(Path(folder).glob("state_*.safetensors"))),
        )


def shaping_settings(config: RunConfig) -> dict[str, Any]:
    """Return what of a config the trained weights depend on, the base's hash with it."""
    return {
        "train": config.train.model_dump(mode="json", exclude=_NOT_SHAPING),
        "system_prompt": config.model.system_prompt,
        "base_files": file_hashes(model_folder(config.model)),
        "versions": versions(*LIBRARIES),
    }


def _collect(result: "Result", folder: Path, work: Path | None) -> None:
    """Copy the last checkpoint's artifact and the trackers' files, and draw the curve."""
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as last:
        shutil.copytree(Path(last) / "artifact", folder, dirs_exist_ok=True)
        shutil.copy(Path(last) / METRICS, folder / METRICS)
    if work is not None and (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", folder / "tensorboard", dirs_exist_ok=True)
    draw_curve(read_metrics(folder / METRICS), folder / "curve.png")
