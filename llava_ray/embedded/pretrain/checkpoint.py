"""The checkpoint from which a run goes on, or from which the model is exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ray.errors import ConfigError

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Any]) -> Path:
    """Write the state of modules, optimizer and schedule, under a temporary name first."""
    state = {name: part.state_dict() for name, part in parts.items()}
    path = folder / CHECKPOINT
    temporary = path.with_suffix(".part")
    torch.save({"step": step, **state}, temporary)
    return temporary.replace(path)


def load_checkpoint(folder: Path, parts: Mapping[str, Any]) -> int:
    """Fill the named parts from the folder's checkpoint; return the step that it was written at.

    Raises ConfigError where there is none, or one of a model of another shape.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ConfigError(f"no {CHECKPOINT} in {folder}: run 'llava-ray pretrain train' first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} does not fit this model: {error}") from error
    return int(state["step"])
