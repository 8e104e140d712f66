"""Shapes of LLaVA models by name, for what needs no weights: speed of training, and its memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LLAVA_7B: Mapping[str, Any] = {
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
"""config.json of llava-hf/llava-1.5-7b-hf, with the sizes that it leaves to transformers."""

TINY: Mapping[str, Any] = {
    **LLAVA_7B,
    "image_token_index": 255,
    "text_config": {
        **LLAVA_7B["text_config"],
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    "vision_config": {
        **LLAVA_7B["vision_config"],
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 28,
    },
}  # fmt: skip
"""The same model in a size that a processor trains in a moment."""


def random_model(tree: Mapping[str, Any], device: str, dtype: "torch.dtype") -> Any:
    """Return a LlavaForConditionalGeneration with weights drawn on the device."""
    import torch
    from transformers import AutoModelForImageTextToText, LlavaConfig

    torch.manual_seed(0)
    with torch.device(device):
        # Of the class that the config names.
        auto: Any = AutoModelForImageTextToText
        return auto.from_config(LlavaConfig(**tree), dtype=dtype)
