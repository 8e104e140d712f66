"""What the tests of GGUF share: a model that is small but whose logits tell mistakes apart."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.gguf_writer import write_f32_folder

WEIGHTS = "model.safetensors"
# Weights large enough that a wrong activation or order of heads shows in the logits.
SPREAD = 0.15


def small_model(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """Write a random LLaVA with the embedded tokenizer, 4 image tokens and 2 layers.

    changes: config keys by part: text_config, vision_config, top.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"] |= {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 64, "initializer_range": SPREAD,
    } | dict(changes.get("text_config", {}))  # fmt: skip
    tree["vision_config"] |= {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": 32,
        "initializer_range": SPREAD, "initializer_factor": 4.0,
    } | dict(changes.get("vision_config", {}))  # fmt: skip
    tree |= {"image_seq_length": 4} | dict(changes.get("top", {}))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**tree))
    # The head alone stays small, for logits near 1.
    model.lm_head.weight.data.mul_(0.3)
    model.half().save_pretrained(folder)
    return folder


def change_config(folder: Path, part: str | None, **values: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    (tree[part] if part else tree).update(values)
    path.write_text(json.dumps(tree))


def write_f32(merged: Path, out: Path) -> Path:
    """Make a folder of the F32 pair and return it."""
    out.mkdir()
    write_f32_folder(merged, out)
    return out
