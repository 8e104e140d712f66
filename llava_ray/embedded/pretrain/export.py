"""From a pretraining checkpoint to the shipped model folder."""

from pathlib import Path

from llava_ray.embedded import architecture, captions, vocabulary
from llava_ray.embedded.pretrain.checkpoint import Progress, load_checkpoint
from llava_ray.embedded.pretrain.network import Reader
from llava_ray.embedded.scene_text import dataset_scene, load_assets

TOKENIZER_SCENES = 3000


def write_tokenizer(folder: Path, seed: int = 5) -> None:
    """Choose the tokens from captions of generated scenes; write tokenizer and processor."""
    assets = load_assets("train")
    texts: list[str] = []
    for index in range(TOKENIZER_SCENES):
        scene, rng = dataset_scene(assets, seed, index)
        texts.append(captions.condensed(scene, rng))
        for question, answer in captions.exchanges(scene, rng):
            texts += [f"USER: {question} ASSISTANT:", answer]
    tokenizer = vocabulary.train(vocabulary.count_words(texts))
    architecture.save_processor(folder, vocabulary.wrap(tokenizer))


def export_model(checkpoint: Path, folder: Path) -> Progress:
    """Write a checkpoint's weights as fp16 LlavaForConditionalGeneration.

    The CLIP layer after the selected one is never used; its outputs are set to zero.
    """
    import torch

    reader = Reader()
    progress = load_checkpoint(checkpoint, {"reader": reader})
    model = architecture.build_model(seed=0)
    unused, unexpected = model.load_state_dict(reader.state_dict(), strict=False)
    assert not unexpected, unexpected
    last = f"vision_tower.encoder.layers.{reader.shape.vision_layers}."
    assert all(last in name or "post_layernorm" in name for name in unused), unused
    with torch.no_grad():
        for name, value in model.named_parameters():
            if last in name and ("out_proj" in name or "fc2" in name):
                value.zero_()
    architecture.save_model(model, folder)
    return progress
