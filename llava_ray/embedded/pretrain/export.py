"""The checkpoint from which a run goes on, and the shipped model folder that is made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llava_ray.embedded import captions, vocabulary
from llava_ray.embedded.pretrain.network import shipped_reader
from llava_ray.embedded.scene_text import dataset_scene, load_assets
from llava_ray.errors import ConfigError
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.tensors import copy_sidecars

TOKENIZER_SCENES, TOKENIZER_SEED = 3000, 5

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


def write_tokenizer(folder: Path) -> Path:
    """Choose the tokens from captions of generated scenes; write tokenizer and processor."""
    assets = load_assets("train")
    texts: list[str] = []
    for index in range(TOKENIZER_SCENES):
        scene, rng = dataset_scene(assets, TOKENIZER_SEED, index)
        texts.append(captions.condensed(scene, rng))
        for question, answer in captions.exchanges(scene, rng):
            texts += [f"USER: {question} ASSISTANT:", answer]
    tokenizer = vocabulary.train(texts)
    folder.mkdir(parents=True, exist_ok=True)
    if not folder.samefile(EMBEDDED):
        copy_sidecars(EMBEDDED, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def export_model(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint's weights as fp16 LlavaForConditionalGeneration, without the probe."""
    reader = shipped_reader()
    load_checkpoint(checkpoint, {"reader": reader})
    model = reader.llava.half()
    model.generation_config = GenerationConfig.from_pretrained(EMBEDDED)
    model.save_pretrained(folder)
    return folder
