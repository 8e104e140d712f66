"""From a pretraining checkpoint to the shipped model folder."""

from pathlib import Path

from transformers import GenerationConfig

from llava_ray.embedded import captions, vocabulary
from llava_ray.embedded.pretrain.checkpoint import load_checkpoint
from llava_ray.embedded.pretrain.network import shipped_reader
from llava_ray.embedded.scene_text import dataset_scene, load_assets
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.tensors import copy_sidecars

TOKENIZER_SCENES, TOKENIZER_SEED = 3000, 5


def write_tokenizer(folder: Path) -> Path:
    """Choose the tokens from captions of generated scenes; write tokenizer and processor."""
    assets = load_assets("train")
    texts: list[str] = []
    for index in range(TOKENIZER_SCENES):
        scene, rng = dataset_scene(assets, TOKENIZER_SEED, index)
        texts.append(captions.condensed(scene, rng))
        for question, answer in captions.exchanges(scene, rng):
            texts += [f"USER: {question} ASSISTANT:", answer]
    tokenizer = vocabulary.train(vocabulary.count_words(texts))
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
