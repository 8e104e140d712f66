"""The base model with what is trained of it: LoRA on the language model, and the projector.

Works without Ray and DeepSpeed, so the speed benchmark runs the very same model.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.config import TrainConfig
from llava_ray.conversation import IGNORE_INDEX
from llava_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

QUANTIZATION_SKIPS = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
"""transformers matches these from the start of a module's name."""

PROJECTOR = "multi_modal_projector."


def load_base(
    folder: Path, *, dtype: "torch.dtype", device: str | None, nf4: bool = False
) -> "nn.Module":
    """Load the model in a dtype onto a device, or in 4-bit nf4 with double quantization.

    `device` None leaves the placement to DeepSpeed's ZeRO-3.
    """
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

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
    model: nn.Module = LlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    return model


def adapt(model: "nn.Module", train: TrainConfig) -> "nn.Module":
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
    if train.gradient_checkpointing:
        language_model = base_of(model).model.language_model  # type: ignore[union-attr]
        language_model.gradient_checkpointing_enable(  # type: ignore[operator, union-attr]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model


def _with_lora(model: "nn.Module", train: TrainConfig) -> "nn.Module":
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
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def lora_pattern(targets: tuple[str, ...]) -> str:
    """Return a regex on full module names: the vision tower has layers of the same short names."""
    return rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})"


def base_of(model: "nn.Module") -> "nn.Module":
    """Return the LlavaForConditionalGeneration inside a PeftModel, or the model itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def parameter_groups(model: "nn.Module", train: TrainConfig) -> list[dict[str, Any]]:
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


def _is_matrix(parameter: "nn.Parameter") -> bool:
    # ZeRO-3 leaves an empty tensor in place of a parameter and keeps its shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def loss_module(model: "nn.Module") -> "nn.Module":
    """Return a module whose forward gives the summed cross entropy of a batch in fp32.

    The head runs only on positions that carry a label: with 576 image tokens and a short caption
    that leaves out most of the logits.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class CaptionLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor,
            pixel_values: torch.Tensor,
        ) -> torch.Tensor:
            llava: Any = base_of(self.model)
            hidden = llava.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                use_cache=False,
            ).last_hidden_state
            targets = labels[:, 1:]
            chosen = targets != IGNORE_INDEX
            logits = llava.lm_head(hidden[:, :-1][chosen])
            return functional.cross_entropy(logits.float(), targets[chosen], reduction="sum")

    return CaptionLoss(model)
