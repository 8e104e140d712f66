"""The base model with what is trained of it: LoRA on the language model, and the projector.

Works without Ray and DeepSpeed, so the speed benchmark runs the very same model.
"""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.models.conversation import IGNORE_INDEX

logger = logging.getLogger(__name__)

QUANTIZATION_SKIPS = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
"""transformers matches these from the start of a module's name."""

PROJECTOR = "multi_modal_projector."
RECOMPUTE: dict[Any, Any] = {False: "none", "mlp": "mlp", True: "layer"}
"""By train.gradient_checkpointing what fused layers compute again."""


def load_base(
    folder: Path, *, dtype: torch.dtype, device: str | None, nf4: bool = False
) -> nn.Module:
    """Load the model in a dtype onto a device, or in 4-bit nf4 with double quantization.

    `device` None leaves the placement to DeepSpeed's ZeRO-3.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if device is not None:
        kwargs["device_map"] = {"": device}
    if nf4:
        kwargs["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(QUANTIZATION_SKIPS),
        )
    model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    return model


def adapt(model: nn.Module, train: TrainConfig) -> nn.Module:
    """Freeze all but what `train` names; wrap in a PeftModel unless method is full.

    Raises ConfigError when lora_targets matches no layer.
    """
    if train.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_tower." not in name)
    else:
        model = _with_lora(model, train)
    for name, parameter in model.named_parameters():
        if PROJECTOR in name:
            parameter.requires_grad_(train.projector_learning_rate > 0)
    return model


def _with_lora(model: nn.Module, train: TrainConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    pattern = lora_pattern(train.lora_targets)
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    for target in train.lora_targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"train.lora_targets {target!r}: the language model has no such linear layer; "
                "LLaMA's are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            )
    config = LoraConfig(
        r=train.lora_r,
        lora_alpha=train.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=train.lora_dropout,
        target_modules=pattern,
        use_dora=train.use_dora,
        use_rslora=train.use_rslora,
        bias="none",
    )
    # ZeRO-3 shards trained weights of one dtype only, so peft must not raise LoRA's to fp32 there;
    # all engines keep fp32 masters besides.
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=train.zero_stage != 3)
    return adapted


def lora_pattern(targets: tuple[str, ...]) -> str:
    """Return a regex on full module names: the vision tower has layers of the same short names."""
    return rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})"


def base_of(model: nn.Module) -> nn.Module:
    """Return the LLaVA inside a PeftModel, or the model itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW groups: the projector's own rate, and no weight decay on biases and norms."""
    groups: list[dict[str, Any]] = []
    for is_projector, rate in ((False, train.learning_rate), (True, train.projector_learning_rate)):
        for decay in (train.weight_decay, 0.0):
            chosen = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and (PROJECTOR in name) == is_projector
                and (_is_matrix(p) == (decay is train.weight_decay))
            ]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def rate_factor(train: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return what gives the multiple of the peak learning rate at a step, counted from 0.

    transformers' schedules, as functions of the step alone.
    """
    from transformers import get_scheduler

    name = "constant_with_warmup" if train.lr_scheduler == "constant" else train.lr_scheduler
    unused = torch.optim.SGD([torch.zeros(1)])
    schedule: Any = get_scheduler(
        name, unused, math.ceil(train.warmup_ratio * total_steps), total_steps
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def _is_matrix(parameter: nn.Parameter) -> bool:
    # ZeRO-3 leaves an empty tensor in place of a parameter and keeps its shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def loss_module(model: nn.Module, train: TrainConfig) -> nn.Module:
    """Return a module whose forward gives the summed cross entropy of a batch in fp32.

    The head runs only on positions that carry a label: with 576 image tokens and a short caption
    that leaves out most of the logits. Padding must stand at the right: under causal attention no
    token sees it, so no mask is needed, and attention runs its fastest kernel.
    """

    class CaptionLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.decoder = fused_decoder(model, train)
            checkpointing = self.decoder is None and bool(train.gradient_checkpointing)
            set_checkpointing(base_of(model), on=checkpointing)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor,
            **pictures: torch.Tensor,
        ) -> torch.Tensor:
            llava: Any = base_of(self.model)
            targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            # Looked up before the layers are queued: it makes the processor wait for the GPU.
            chosen = (targets != IGNORE_INDEX).nonzero().flatten()
            embeddings = _embeddings(llava, input_ids, pictures)
            if self.decoder is None:
                hidden = llava.model.language_model(
                    inputs_embeds=embeddings, use_cache=False
                ).last_hidden_state
            else:
                hidden = self.decoder(embeddings)
            logits = llava.lm_head(hidden.flatten(0, 1).index_select(0, chosen))
            return functional.cross_entropy(logits.float(), targets[chosen], reduction="sum")

    return CaptionLoss(model)


def fused_decoder(model: nn.Module, train: TrainConfig) -> Any:
    """Return the decoder with a backward of its own, or None where peft's modules must run."""
    if not train.runs_fused:
        return None
    from llava_ray.train import fused

    llava: Any = base_of(model)
    if reason := fused.obstacle(llava):
        logger.info("train: layers run through transformers and peft (%s)", reason)
        return None
    return fused.Decoder(llava.model.language_model, RECOMPUTE[train.gradient_checkpointing])


def set_checkpointing(llava: Any, *, on: bool) -> None:
    """Let transformers compute its whole layers again in backward, or keep what they save."""
    language_model = llava.model.language_model
    name = (
        "activation" if hasattr(language_model, "activation_checkpointing_enable") else "gradient"
    )
    if on:
        enable = getattr(language_model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(language_model, f"{name}_checkpointing_disable")()


def _embeddings(
    llava: Any, input_ids: torch.Tensor, pictures: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Put the projected images where the image tokens stand.

    Of a batch of text alone nothing is taken of its blank picture.
    """
    pixels = pictures.pop("pixel_values").to(llava.dtype)
    found = llava.model.get_image_features(pixel_values=pixels, return_dict=True, **pictures)
    embeddings: torch.Tensor = llava.get_input_embeddings()(input_ids)
    places = (input_ids == llava.config.image_token_id)[..., None]
    return embeddings.masked_scatter(places, torch.cat(list(found.pooler_output)).to(embeddings))
