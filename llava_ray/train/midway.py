"""An adapter from a checkpoint of a run that is still going on, for sweeps that judge it."""

import shutil
from pathlib import Path

from llava_ray.artifacts.records import AdapterCheckpoint, DatasetRecord
from llava_ray.artifacts.store import ArtifactStore, artifact_id
from llava_ray.config.run import RunConfig
from llava_ray.models.folder import model_folder, weights_sha256
from llava_ray.train.checkpoint import read_state


def seal_midway(
    config: RunConfig, dataset: DatasetRecord, checkpoint: str, step: int
) -> AdapterCheckpoint:
    """Copy what a checkpoint exported into an adapter artifact of `config`'s storage.

    The checkpoint must come from a run with `export_always`.
    """
    from ray.train import Checkpoint

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
