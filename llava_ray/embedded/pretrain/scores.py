"""What the model reads on generated scenes, while it trains and once it is exported."""

import json
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.benchmark.caption_scores import caption_scores
from llava_ray.embedded.captions import DESCRIBE, plain
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.embedded.scene_text import dataset_picture, load_assets
from llava_ray.embedded.words import Split
from llava_ray.errors import ConfigError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import encode_prompt
from llava_ray.models.folder import weights_sha256
from llava_ray.models.images import normalize, square_pixels

SCORE_SEED = 424_242
SHOWN_SEED, SHOWN = 7, (2, 3)
"""Of the scenes in `draw_readings`, other ones than those that are scored: rows and columns."""
WEIGHTS = "model.safetensors"
BATCH = 64
MAX_NEW_TOKENS = 200


def score_model(settings: PretrainSettings) -> Path:
    """Let the model folder read `images` scenes of training's words and fonts; write `scores`.

    The scenes themselves are fresh. Held-out words and fonts are `llava_ray.bench.embedded`'s.
    Raises ConfigError where the folder has no weights.
    """
    folder, count, out = settings.model, settings.images, settings.scores
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"no {WEIGHTS} in {folder}: run 'llava-ray pretrain export' first")
    tree = {
        "train": read_scenes(*load_model(folder), "train", count, settings.assets),
        "images": count,
        "seed": SCORE_SEED,
        "question": DESCRIBE,
        "code_digest": code_digest("pretrain"),
        "base_model_sha256": weights_sha256(folder),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def load_model(folder: Path) -> tuple[Any, Any]:
    """Load a model folder in fp32, and its tokenizer."""
    model: Any = LlavaForConditionalGeneration
    return model.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def read_scenes(
    model: Any, tokenizer: Any, split: Split, count: int, assets: Path | None = None
) -> dict[str, float]:
    """Return the caption scores of `count` scenes of one split's words and fonts."""
    images, references = _scenes(split, count, assets)
    return caption_scores(references, describe(model, tokenizer, images))


@lru_cache(maxsize=2)
def _scenes(split: Split, count: int, assets: Path | None) -> tuple[list[Image.Image], list[str]]:
    """Return pictures and their captions."""
    loaded = load_assets(split, assets)
    drawn = [dataset_picture(loaded, SCORE_SEED, index) for index in range(count)]
    return [image for image, _, _ in drawn], [plain(scene) for _, scene, _ in drawn]


def describe(
    model: Any, tokenizer: Any, images: Sequence[Image.Image], question: str = DESCRIBE
) -> list[str]:
    """Answer a question about each picture, greedily."""
    size, tokens = model.config.vision_config.image_size, model.config.image_seq_length
    prompt = encode_prompt(tokenizer, [Turn(question, num_images=1)], [tokens])
    answers: list[str] = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        pixels = torch.stack([normalize(square_pixels(image, size)) for image in batch])
        ids = torch.tensor([prompt] * len(batch), device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels.to(model.device),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        answers += tokenizer.batch_decode(out[:, len(prompt) :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def draw_readings(settings: PretrainSettings) -> Path:
    """Write `picture`: held-out scenes in a grid, each with the model's greedy answer below it."""
    from matplotlib.figure import Figure

    loaded, (rows, columns) = load_assets("held_out", settings.assets), SHOWN
    images = [dataset_picture(loaded, SHOWN_SEED, index)[0] for index in range(rows * columns)]
    answers = describe(*load_model(settings.model), images)
    figure = Figure(figsize=(4 * columns, 4.3 * rows), layout="constrained")
    for axis, image, answer in zip(figure.subplots(*SHOWN).flat, images, answers, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(textwrap.fill(answer, width=44), fontsize=10, y=-0.02, va="top")
    settings.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.picture, dpi=90)
    return settings.picture
