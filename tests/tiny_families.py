"""Tiny random LLaVAs of several backbones and towers, with the embedded model's tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.models.folder import EMBEDDED

_TEXT = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
}  # fmt: skip
_TIED = {"tie_word_embeddings": True}
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"}}
_NEXT = {
    "model_type": "llava_next",
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"text_config": _TIED, **_TIED},
    "llama-wide": {"text_config": {"intermediate_size": 256}},
    "llama-3": {"text_config": {"rope_parameters": _LLAMA_3_ROPE}},
    "llama-yarn": {"text_config": {"rope_parameters": _YARN}},
    "mistral": {"text_config": {"model_type": "mistral", "sliding_window": None}},
    "mistral-window": {"text_config": {"model_type": "mistral", "sliding_window": 24}},
    "qwen2": {"text_config": {"model_type": "qwen2", **_TIED}, **_TIED},
    "qwen2-window": {
        "text_config": {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24,
            "max_window_layers": 1,
        }
    },
    "clip-full": {"vision_feature_select_strategy": "full"},
    "clip-two-layers": {"vision_feature_layer": [-2, -1]},
    "siglip-full": {**_SIGLIP, "vision_feature_select_strategy": "full"},
    "siglip-default": {**_SIGLIP, "vision_feature_select_strategy": "default"},
    "llava-next": {**_NEXT, "vision_config": {"patch_size": 8}},
    "llava-next-mistral": {**_NEXT, "text_config": {"model_type": "mistral"}},
    "llava-next-siglip": {**_NEXT, **_SIGLIP, "vision_feature_select_strategy": "full"},
}  # fmt: skip
IMAGE_TOKENS = {
    "clip-full": 5, "siglip-default": 3, "llava-next": 52, "llava-next-mistral": 14,
    "llava-next-siglip": 14,
}  # fmt: skip
"""Of an image of 75x40, where they are not 4."""


def write_family(name: str, folder: Path) -> Any:
    """Write the model's folder; return the model, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    more: dict[str, Any] = {"model_type": "llava", **FAMILIES[name]}
    text, vision = more.pop("text_config", {}), more.pop("vision_config", {})
    config = AutoConfig.for_model(
        text_config=_TEXT | text, vision_config=_CLIP | vision, image_token_index=1022, **more
    )
    auto: Any = AutoModelForImageTextToText
    hidden = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(EMBEDDED, folder, ignore=hidden)
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # As they are drawn, neither biases nor attention would change much.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    images = json.loads(path.read_text())
    images |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    if "siglip" in name:
        images |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(images))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor": images}))
    return model
