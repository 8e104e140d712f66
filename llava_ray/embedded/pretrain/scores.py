"""What the model reads on generated scenes, while it trains and once it is exported."""

import json
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
from llava_ray.embedded.scene_text import dataset_picture, load_assets
from llava_ray.embedded.words import Split
from llava_ray.errors import ConfigError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import encode_prompt
from llava_ray.models.folder import weights_sha256
from llava_ray.models.images import normalize, square_pixels

SCORE_SEED = 424_242
WEIGHTS = "model.safetensors"
BATCH = 64
MAX_NEW_TOKENS = 200


def score_model(folder: Path, count: int, out: Path, assets: Path | None = None) -> Path:
    """Let a model folder read `count` scenes of training's words and fonts; write JSON.

    The scenes themselves are fresh. Held-out words and fonts are `llava_ray.bench.embedded`'s.
    Raises ConfigError where the folder has no weights.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"no {WEIGHTS} in {folder}: run 'llava-ray pretrain export' first")
    tree = {
        "train": read_scenes(*load_model(folder), "train", count, assets),
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
