"""Checkpoints of pretraining, in shards that stay below 15 MB each.

Weights are kept in fp16 and AdamW's second moments in bf16. First moments are dropped: with
beta1 = 0.9 they are back after some ten steps. The shards of second moments, the later ones,
may be left behind: a run that resumes without them warms its learning rate up again.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_ray.errors import ConfigError

STATE = "state.json"
SHARD_BYTES = 13_000_000


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    share: float = 0.0
    """Of the planned run, 0..1."""
    steps: int = 0
    samples: int = 0
    """Pictures trained on, repeats counted."""
    rendered: int = 0
    """Different pictures."""
    seconds: float = 0.0
    """Wall time of all calls."""
    seed: int = 0


def save_checkpoint(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write shards first and state.json last, each under a temporary name."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {id(value): key for key, value in _parameters(modules)}
    weights = {key: _packed(value, torch.float16) for key, value in _parameters(modules)}
    moments = {
        f"exp_avg_sq.{names[id(parameter)]}": _packed(state["exp_avg_sq"], torch.bfloat16)
        for parameter, state in optimizer.state.items()
    }
    shards = [*_shards(weights), *_shards(moments)]
    for number, shard in enumerate(shards):
        _replace(folder / f"shard_{number}.safetensors", shard)
    for stale in folder.glob("shard_*.safetensors"):
        if int(stale.stem.partition("_")[2]) >= len(shards):
            stale.unlink()
    steps = {"optimizer_steps": progress.steps, **dataclasses.asdict(progress)}
    temporary = folder / f"{STATE}.part"
    temporary.write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / STATE)


def load_checkpoint(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Fill modules and optimizer; return the progress.

    Raises ConfigError where the folder holds no checkpoint of this shape.
    """
    path = folder / STATE
    if not path.is_file():
        raise ConfigError(f"no checkpoint in {folder}: {STATE} is missing")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("shard_*.safetensors")):
        tensors.update(load_file(shard))
    tree = json.loads(path.read_text(encoding="utf-8"))
    steps = tree.pop("optimizer_steps")
    for key, parameter in _parameters(modules):
        if key not in tensors or tensors[key].shape != parameter.shape:
            raise ConfigError(f"checkpoint {folder} does not fit this model: {key} differs")
        parameter.data.copy_(tensors[key])
        second = tensors.get(f"exp_avg_sq.{key}")
        if optimizer is not None and second is not None:
            optimizer.state[parameter] = {
                # AdamW's fused step counts on the device.
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": second.to(parameter),
            }
    return Progress(**tree)


def _parameters(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def _packed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype).contiguous()


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in tensors.items():
        if size + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    return shards


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    save_file(tensors, temporary)
    os.replace(temporary, path)
