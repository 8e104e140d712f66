"""Scores of the shipped model, and its card filled in from them."""

import json
import statistics
from pathlib import Path
from typing import Any, get_args

from llava_ray.artifacts import CARD, sha256_of
from llava_ray.errors import ConfigError
from llava_ray.tiny.captions import DESCRIBE, plain
from llava_ray.tiny.decode import SCORE_SEED
from llava_ray.tiny.draw import degrade, draw
from llava_ray.tiny.examples import IMAGE_SIZE
from llava_ray.tiny.pretrain import PretrainSettings
from llava_ray.tiny.reading import character_error_rate, word_recall
from llava_ray.tiny.scene_text import Assets, dataset_scene, load_assets
from llava_ray.tiny.words import Split

LOG = "pretrain_log.jsonl"
WEIGHTS = "model.safetensors"
BATCH = 16
MAX_NEW_TOKENS = 200


def score_model(folder: Path, count: int, out: Path, assets: Path | None = None) -> Path:
    """Let a model folder read `count` scenes of each split; write the scores as JSON.

    Raises ConfigError where the folder has no weights.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"no {WEIGHTS} in {folder}: run 'python jobs/pretrain.py export' first")
    tree: dict[str, Any] = {
        split: _score_split(folder, load_assets(split, assets), count) for split in get_args(Split)
    }
    tree |= {
        "images_per_split": count,
        "seed": SCORE_SEED,
        "question": DESCRIBE,
        "weights_sha256": sha256_of(folder / WEIGHTS),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return out


def _score_split(folder: Path, assets: Assets, count: int) -> dict[str, float]:
    """Return means over pictures; words and characters are pooled."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    scenes, images = [], []
    for index in range(count):
        scene, rng = dataset_scene(assets, SCORE_SEED, index)
        scenes.append(scene)
        images.append(degrade(draw(scene)[0], rng))
    answers = describe(folder, images)
    recalls, errors, overlaps, words, letters = [], [], [], [], []
    for scene, answer in zip(scenes, answers, strict=True):
        recalls.append(word_recall(answer, scene.words))
        errors.append(character_error_rate(answer, scene.words))
        overlaps.append(rouge.score(plain(scene), answer)["rougeL"].fmeasure)
        words.append(len(scene.words))
        letters.append(len(" ".join(scene.words)))
    return {
        "word_recall": _pooled(recalls, words),
        "word_recall_standard_error": statistics.stdev(recalls) / count**0.5,
        "character_error_rate": _pooled(errors, letters),
        "rouge_l": statistics.mean(overlaps),
        "words": sum(words),
    }


def _pooled(values: list[float], counts: list[int]) -> float:
    return sum(value * n for value, n in zip(values, counts, strict=True)) / sum(counts)


def describe(folder: Path, images: list[Any]) -> list[str]:
    """Answer the detailed question about PIL images, greedily, in fp32."""
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from llava_ray.conversation import Turn, encode_prompt
    from llava_ray.images import normalize, square_pixels
    from llava_ray.tiny.architecture import TOKENS_PER_IMAGE

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


CARD_TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# A tiny LLaVA that reads

LLaVA-1.5's parts in small: a CLIP tower (7 layers of width 256, the sixth selected), a two-layer
GELU projector and a Llama (6 layers of width 256), 11.5 million weights, fp16. It reads generated
scene text and says where and on what it stands. It is a yardstick for fine-tuning and
quantization on a CPU; it knows nothing of photographs.

## Training
Everything was trained from scratch in LLaVA's two stages by `jobs/pretrain.py`: first
transcription of single words growing into scenes, then questions of many kinds. A probe that
names the letters of each patch trained beside it and was dropped.

| | |
| --- | --- |
| steps | {steps:,} |
| pictures a step | {batch_size} |
| pictures trained on a second | {trained_per_s:,.0f} |
| fresh pictures rendered a second | {rendered_per_s:,.0f} |
| seed | {seed} |

`pretrain_log.jsonl` beside this card is the run's own log.

The pictures are drawn from the fonts and words of the packages in the extra `scene-text`. A tenth
of the words (by hash) and the families Caladea, Fredoka One and Hanken Grotesk were held out.

## Scores
Greedy answers to "{question}" on {images} scenes per split, words pooled. A word counts only if
quoted exactly, case and marks included.

| words and fonts | word recall | standard error | character error rate | ROUGE-L |
| --- | --- | --- | --- | --- |
| held out | {held[word_recall]:.1%} | {held[word_recall_standard_error]:.1%} | \
{held[character_error_rate]:.1%} | {held[rouge_l]:.3f} |
| of training | {train[word_recall]:.1%} | {train[word_recall_standard_error]:.1%} | \
{train[character_error_rate]:.1%} | {train[rouge_l]:.3f} |
"""


def write_card(folder: Path, scores: Path) -> Path:
    """Write the model card from the scores and from the training's log in the model's folder.

    Raises ConfigError where either is missing or the scores are of other weights.
    """
    for path in (scores, folder / LOG):
        if not path.is_file():
            raise ConfigError(f"the card needs {path}, which is missing")
    tree = json.loads(scores.read_text(encoding="utf-8"))
    if tree["weights_sha256"] != sha256_of(folder / WEIGHTS):
        raise ConfigError(f"{scores} is of other weights than {folder}: score the model anew")
    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    paced = [row for row in rows if "trained_per_s" in row]
    text = CARD_TEXT.format(
        steps=rows[-1]["step"],
        batch_size=PretrainSettings.batch_size,
        trained_per_s=paced[-1]["trained_per_s"],
        rendered_per_s=paced[-1]["rendered_per_s"],
        seed=PretrainSettings.seed,
        question=tree["question"],
        images=tree["images_per_split"],
        held=tree["held_out"],
        train=tree["train"],
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path
