"""Training state that any number of workers under any ZeRO stage can go on from.

Every rank writes whole tensors of its share of the trained parameters: the weight and what the
optimizer keeps of it, under ZeRO in fp32. DeepSpeed's own checkpoint is bound to the number of
workers that wrote it.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn

from llava_ray.artifacts.records import AdapterCheckpoint
from llava_ray.train.adapt import PROJECTOR
from llava_ray.train.replica import ReplicaEngine
from llava_ray.train.zero import full_weight, set_adam_step

STATE = "state.json"


class TrainState(BaseModel):
    """Where a run stands."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """The data cursor: samples of the stream that were seen."""
    total_samples: int
    group: int
    """Samples of a step when the run started; the stream's order depends on it."""
    train_s: float = 0
    """Seconds in the loop so far, those of lost work left out."""
    loss_scale: float | None = None
    """The factor of fp16's loss; None in other dtypes."""
    loss: float | None = None
    """The loss of the last step, nats per supervised token over all workers."""
    tail_loss: float = 0.0
    """Sum of the losses of the steps that `train_loss` is the mean of."""
    tail_steps: int = 0

    @property
    def train_loss(self) -> float:
        """Mean over the last tenth of the run's steps."""
        return self.tail_loss / self.tail_steps

    @property
    def samples_per_s(self) -> float:
        """Over the whole run, lost work left out."""
        return self.samples / max(self.train_s, 1e-9)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, in an order that is the same on every rank."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def save_state(engine: Any, folder: Path, state: TrainState, *, rank: int, world_size: int) -> None:
    """Write this rank's share into its folder; every rank must call it, rank 0 writes the state.

    All ranks gather each tensor, because ZeRO spreads it over them.
    """
    mine: dict[str, torch.Tensor] = {}
    for index, (name, parameter) in enumerate(trained_parameters(engine.module).items()):
        whole = _read(engine, parameter)
        if index % world_size == rank:
            mine |= {f"{kind}/{name}": tensor for kind, tensor in whole.items()}
    save_file(mine, folder / f"state_{rank:05d}.safetensors")
    if rank == 0:
        (folder / STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")


def _read(engine: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    if isinstance(engine, ReplicaEngine):
        return engine.tensors(parameter)
    from deepspeed.utils import safe_get_full_optimizer_state

    whole = {"weight": full_weight(engine, parameter)}
    for moment in ("exp_avg", "exp_avg_sq"):
        whole[moment] = safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()
    return whole


def read_state(folder: Path) -> TrainState:
    """Read where the run of a checkpoint stands."""
    return TrainState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))


def load_state(engine: Any, folder: Path, state: TrainState) -> None:
    """Set weights, moments, step and loss scale; every rank must call it."""
    parameters = trained_parameters(engine.module)
    seen: set[str] = set()
    for path in sorted(folder.glob("state_*.safetensors")):
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(path).items():
            kind, _, name = key.partition("/")
            found.setdefault(name, {})[kind] = value
        for name, values in found.items():
            _write(engine, parameters[name], values, state.step)
        seen |= found.keys()
    assert seen == parameters.keys(), f"checkpoint lacks {sorted(parameters.keys() - seen)[:3]}"
    if not isinstance(engine, ReplicaEngine):
        set_adam_step(engine, state.step)
    if state.loss_scale is not None:
        engine.optimizer.loss_scaler.cur_scale = state.loss_scale


def _write(
    engine: Any, parameter: nn.Parameter, values: dict[str, torch.Tensor], step: int
) -> None:
    if isinstance(engine, ReplicaEngine):
        engine.load(parameter, values, step)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    values = {kind: value.to(engine.device) for kind, value in values.items()}
    weight = values.pop("weight")
    safe_set_full_fp32_param(parameter, weight)
    _set_model_weight(parameter, weight)
    for kind, value in values.items():
        safe_set_full_optimizer_state(parameter, value, kind)


def export(engine: Any, folder: Path, *, base_model: str, rank: int) -> None:
    """Gather the trained weights on all ranks and write on rank 0 what a run leaves.

    That is a peft adapter (or the weights of a full fine-tune) and the projector.
    """
    weights = {}
    for name, parameter in trained_parameters(engine.module).items():
        value = full_weight(engine, parameter)
        if rank == 0:
            weights[name.removeprefix("model.")] = value
    if rank != 0:
        return
    folder.mkdir()
    model = engine.module.model
    projector = {
        name.removeprefix("base_model.model."): weights.pop(name)
        for name in list(weights)
        if PROJECTOR in name
    }
    if projector:
        save_file(projector, folder / AdapterCheckpoint.projector_file)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(
            folder / AdapterCheckpoint.peft_folder, state_dict=weights, save_embedding_layers=False
        )
    else:
        save_file(weights, folder / AdapterCheckpoint.language_model_file)


def _set_model_weight(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set what forward reads: DeepSpeed copies it from the fp32 weight only after a step."""
    import deepspeed

    sharded = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
        # Other ranks of ZeRO-3 take rank 0's value when the shards are made again.
        if parameter.numel():
            parameter.data.copy_(value.view_as(parameter))
