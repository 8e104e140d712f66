"""Scores of the shipped model on the words and fonts of its training."""

import json
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.benchmark.caption_scores import caption_scores
from llava_ray.embedded.captions import DESCRIBE, plain
from llava_ray.embedded.draw import degrade, draw
from llava_ray.embedded.pretrain.decode import SCORE_SEED
from llava_ray.embedded.pretrain.examples import IMAGE_SIZE
from llava_ray.embedded.scene_text import dataset_scene, load_assets
from llava_ray.errors import ConfigError
from llava_ray.models.folder import weights_sha256

WEIGHTS = "model.safetensors"
BATCH = 16
MAX_NEW_TOKENS = 200


def score_model(folder: Path, count: int, out: Path, assets: Path | None = None) -> Path:
    """Let a model folder read `count` scenes of training's words and fonts; write JSON.

    The scenes themselves are fresh. Held-out words and fonts are `llava_ray.bench.embedded`'s.
    Raises ConfigError where the folder has no weights.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"no {WEIGHTS} in {folder}: run 'python jobs/pretrain.py export' first")
    loaded = load_assets("train", assets)
    references, images = [], []
    for index in range(count):
        scene, rng = dataset_scene(loaded, SCORE_SEED, index)
        references.append(plain(scene))
        images.append(degrade(draw(scene)[0], rng))
    tree = {
        "train": caption_scores(references, describe(folder, images)),
        "images": count,
        "seed": SCORE_SEED,
        "question": DESCRIBE,
        "code_digest": code_digest("pretrain"),
        "base_model_sha256": weights_sha256(folder),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def describe(folder: Path, images: list[Any]) -> list[str]:
    """Answer the detailed question about PIL images, greedily, in fp32."""
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from llava_ray.embedded.architecture import TOKENS_PER_IMAGE
    from llava_ray.models.conversation import Turn, encode_prompt
    from llava_ray.models.images import normalize, square_pixels

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = encode_prompt(
        tokenizer, [Turn(DESCRIBE, num_images=1)], tokens_per_image=TOKENS_PER_IMAGE
    )
    answers: list[str] = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        pixels = torch.stack([normalize(square_pixels(image, IMAGE_SIZE)) for image in batch])
        ids = torch.tensor([prompt] * len(batch))
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        told = out[:, len(prompt) :].tolist()
        answers += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in told]
    return answers
