"""Training without DeepSpeed: each worker holds all weights and the whole optimizer.

What LoRA trains is small, so there is little to shard, and ZeRO's bookkeeping for each parameter
slows a step (jobs/results/train_h100.json, zero2 beside replica). Also for optimizers that ZeRO
cannot shard, since it flattens weights into pieces: 8-bit AdamW quantizes its moments in blocks of
a weight, GaLore projects whole gradient matrices.
"""

from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from llava_ray.config.run import TrainConfig

_BASIS = "ortho_matrix"
"""GaLore's projection, which its optimizer keeps in an object of its own."""


class ReplicaEngine:
    """What the training loop uses of a DeepSpeed engine, by plain PyTorch.

    Forward reads the trained weights in `dtype`; AdamW changes an fp32 copy of them.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        train: TrainConfig,
        dtype: torch.dtype,
    ) -> None:
        self.module = module
        self._trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.device = self._trained[0].device
        self._changed = self._trained
        if train.optimizer == "adamw" and dtype != torch.float32:
            # Steps are often smaller than bf16 can add to a weight.
            self._changed = [nn.Parameter(p.detach().float()) for p in self._trained]
        for parameter in self._trained:
            parameter.data = parameter.data.to(dtype)
        self._masters = dict(zip(map(id, self._trained), self._changed, strict=True))
        wide = [{**g, "params": [self._masters[id(p)] for p in g["params"]]} for g in groups]
        self.optimizer = _optimizer(module, wide, train)
        self._accumulation = train.gradient_accumulation
        self._max_norm = train.max_grad_norm
        self._micro_steps = 0
        self._norm: torch.Tensor | None = None
        module.train()

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return the module's loss."""
        loss: torch.Tensor = self.module(**batch)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share to the gradients."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]
        for parameter, master in zip(self._trained, self._changed, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self) -> None:
        """After the last micro-batch: average over workers, clip, and change the weights."""
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return

        _average_gradients(self._changed)
        self._norm = clip_grad_norm_(self._changed, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._changed is not self._trained:
            with torch.no_grad():
                torch._foreach_copy_(list[Any](self._trained), list[Any](self._changed))

    def get_global_grad_norm(self) -> float | None:
        """Return the norm of the last step's gradient before clipping."""
        return None if self._norm is None else float(self._norm)

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a trained weight in the precision that AdamW changes it in."""
        return self._masters[id(parameter)].detach()

    def tensors(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return a weight and its optimizer's state by kind, on the CPU."""
        state = self.optimizer.state.get(self._masters[id(parameter)], {})
        found = {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor)}
        found.pop("step", None)
        if "projector" in state:
            found[_BASIS] = state["projector"].ortho_matrix
        found["weight"] = self.weight(parameter)
        return {kind: value.detach().cpu().clone().contiguous() for kind, value in found.items()}

    def load(self, parameter: nn.Parameter, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Set what `tensors` returned, and how many steps were done."""
        master = self._masters[id(parameter)]
        with torch.no_grad():
            master.copy_(tensors.pop("weight").view_as(master))
            parameter.copy_(master)
        if not tensors:
            return
        state: dict[str, Any] = {k: v.to(master.device) for k, v in tensors.items()}
        basis = state.pop(_BASIS, None)
        if basis is not None:
            state["projector"] = self._projector(master, basis)
        # PyTorch counts in a tensor, bitsandbytes and GaLore in an int.
        plain = isinstance(self.optimizer, torch.optim.AdamW)
        device = master.device if self.optimizer.defaults.get("fused") else "cpu"
        state["step"] = torch.tensor(float(step), device=device) if plain else step
        if plain:
            # ZeRO keeps moments flat.
            state |= {k: v.view_as(master) for k, v in state.items() if k != "step"}
        self.optimizer.state[master] = state

    def _projector(self, parameter: nn.Parameter, basis: torch.Tensor) -> Any:
        from galore_torch.galore_projector import GaLoreProjector

        group = next(
            g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])
        )
        names = ("rank", "update_proj_gap", "scale", "proj_type")
        projector = GaLoreProjector(**{name: group[name] for name in names})
        projector.ortho_matrix = basis
        return projector


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all workers in one message."""
    world = torch.distributed.get_world_size()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world > 1 and gradients:
        flat = parameters_to_vector(gradients)
        torch.distributed.all_reduce(flat)
        vector_to_parameters(flat.div_(world), gradients)


def _optimizer(
    module: nn.Module, groups: list[dict[str, Any]], train: TrainConfig
) -> torch.optim.Optimizer:
    if train.optimizer == "adamw":
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, fused=on_gpu)
    if train.optimizer == "adamw8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups)  # type: ignore[no-untyped-call]
    from galore_torch import GaLoreAdamW

    galore: torch.optim.Optimizer = GaLoreAdamW(
        _galore_groups(module, groups, train), eps=1e-8, no_deprecation_warning=True
    )
    return galore


def _galore_groups(
    module: nn.Module, groups: list[dict[str, Any]], train: TrainConfig
) -> list[dict[str, Any]]:
    """Split the layers' matrices off: embedding, head, norms and projector keep plain AdamW.

    Source: GaLore, torchrun_main.py, target_modules_list.
    """
    projected = {
        id(p)
        for name, p in module.named_parameters()
        if p.dim() == 2 and (".self_attn." in name or ".mlp." in name)
    }
    extra = {
        "rank": train.galore_rank, "update_proj_gap": train.galore_update_steps,
        "scale": train.galore_scale, "proj_type": "std",
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for group in groups:
        for inside in (True, False):
            chosen = [p for p in group["params"] if (id(p) in projected) == inside]
            if chosen:
                found.append({**group, "params": chosen, **(extra if inside else {})})
    return found
