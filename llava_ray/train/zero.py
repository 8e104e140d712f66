"""DeepSpeed's settings, and engines made with them.

DeepSpeed is imported only inside functions, which run in workers: importing it on the driver
starts CUDA there (https://github.com/ray-project/ray/issues/50406).
"""

import logging
import os
import warnings
from typing import Any, Literal

import torch
from torch import nn

from llava_ray.config.run import TrainConfig
from llava_ray.train.estimate import BUCKET
from llava_ray.train.replica import ReplicaEngine

Precision = Literal["bf16", "fp16", "fp32"]

_AHEAD = 250_000_000
"""Weights that ZeRO-3 gathers ahead: a layer of a 7B model."""


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the weights' dtype."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def zero_config(train: TrainConfig, precision: Precision, *, gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's JSON for a train section."""
    stage: dict[str, Any] = {
        "stage": train.zero_stage,
        # Of LoRA's many small gradients each copy costs the host more than it saves.
        "contiguous_gradients": train.method == "full",
        "overlap_comm": gpu,
        # DeepSpeed's default takes 2 GB for buffers that LoRA's gradients do not fill.
        "reduce_bucket_size": BUCKET,
    }
    if train.zero_stage == 3:
        # What is kept whole is gathered one by one after each step; a layer's weights come at once.
        stage["stage3_param_persistence_threshold"] = 0
        stage["stage3_prefetch_bucket_size"] = _AHEAD
    if train.offload != "none":
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if train.offload == "optimizer+weights":
        stage["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": train.max_grad_norm,
        # A look at each gradient for infinity takes longer than the optimizer, and bf16 has fp32's
        # range; a loss that is no number ends the training anyway.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 12},
        "zero_optimization": stage,
        # torch's AdamW over few trained weights needs no compiled op and is fast enough.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def prepare_environment(*, gpu: bool) -> None:
    """Set what DeepSpeed reads at import."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives under names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # On CPUs DeepSpeed would compile shared-memory collectives (up to a minute); gloo's do.
        deepspeed.ops.__compatible_ops__ = {}


def make_engine(module: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine with AdamW over the given parameter groups."""
    import deepspeed

    deepspeed.init_distributed()
    on_gpu = all(p.is_cuda for group in groups for p in group["params"])
    fused = on_gpu and "offload_optimizer" not in config["zero_optimization"]
    optimizer = torch.optim.AdamW(groups, fused=fused)
    if config["zero_optimization"]["stage"] == 3:
        # Gathered layer by layer: hooks on each of LoRA's modules take the host longer than the
        # GPU needs for its work.
        lists = (part for part in module.modules() if isinstance(part, nn.ModuleList))
        deepspeed.utils.set_z3_leaf_modules(module, list({type(part[0]) for part in lists}))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    _make_moments(engine)
    # transformers loads for inference, where nothing is dropped.
    engine.train()
    return engine


def _make_moments(engine: Any) -> None:
    """Make AdamW's state before the first step, so that it can be read and set at any time.

    ZeRO-2 else links the moments after stepping its first parameter group, when the others have
    none yet; ZeRO-3 makes them by a step of its own, which must not count.
    """
    zero, stage2 = engine.optimizer, engine.zero_optimization_stage() == 2
    flats = zero.single_partition_of_fp32_groups if stage2 else zero.fp32_partitioned_groups_flat
    for flat in flats:
        if not zero.optimizer.state[flat]:
            zero.optimizer.state[flat] = {
                # PyTorch's fused AdamW counts on the device.
                "step": torch.tensor(0.0, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
    if stage2:
        zero._lazy_init_hp_params_optimizer_state()
    set_adam_step(engine, 0)


def set_adam_step(engine: Any, step: int) -> None:
    """Set the step that AdamW corrects its moments' bias by."""
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def full_weight(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Return a trained parameter whole and in fp32; all ranks call this together."""
    if isinstance(engine, ReplicaEngine):
        return engine.weight(parameter).float().cpu().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    value: torch.Tensor = safe_get_full_fp32_param(parameter)
    return value.detach().to("cpu").clone().view(getattr(parameter, "ds_shape", parameter.shape))
