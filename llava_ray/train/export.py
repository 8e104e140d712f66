"""What a run leaves: a peft adapter (or the weights of a full fine-tune) and the projector."""

from pathlib import Path
from typing import Any

from llava_ray.artifacts.records import AdapterCheckpoint
from llava_ray.train.adapt import PROJECTOR
from llava_ray.train.checkpoint import trained_parameters
from llava_ray.train.zero import full_weight


def export(engine: Any, folder: Path, *, base_model: str, rank: int) -> None:
    """Gather the trained weights on all ranks and write them on rank 0."""
    from safetensors.torch import save_file

    weights = {}
    for name, parameter in trained_parameters(engine.module).items():
        value = full_weight(engine, parameter)
        if rank == 0:
            weights[name.removeprefix("model.")] = value
    if rank != 0:
        return
    folder.mkdir()
    model = engine.module.model
    projector = {_plain(name): value for name, value in weights.items() if PROJECTOR in name}
    rest = {name: value for name, value in weights.items() if PROJECTOR not in name}
    if projector:
        save_file(projector, folder / AdapterCheckpoint.projector_file)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(
            folder / AdapterCheckpoint.peft_folder, state_dict=rest, save_embedding_layers=False
        )
    else:
        save_file(rest, folder / AdapterCheckpoint.language_model_file)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")
