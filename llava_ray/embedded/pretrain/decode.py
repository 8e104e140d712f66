"""Greedy captions of held-out scenes by the plain PyTorch network, for scores while it trains."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava_ray.benchmark.caption_scores import character_error_rate, word_recall
from llava_ray.embedded.captions import DESCRIBE, plain
from llava_ray.embedded.draw import degrade, draw
from llava_ray.embedded.pretrain.augment import clip_normalize
from llava_ray.embedded.pretrain.examples import IMAGE_SIZE, Encoder
from llava_ray.embedded.pretrain.network import Reader, attention_mask
from llava_ray.embedded.scene_text import dataset_scene, load_assets
from llava_ray.embedded.vocabulary import EOS_ID
from llava_ray.models.images import square_pixels

SCORE_SEED = 424_242
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class ReadingScores:
    """Means over held-out words in held-out fonts."""

    held_out_word_recall: float
    held_out_character_error_rate: float
    held_out_images: int


@lru_cache(maxsize=2)
def _held_out(count: int, assets: Path | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Return pictures and their captions."""
    loaded = load_assets("held_out", assets)
    images, captions = [], []
    for index in range(count):
        scene, rng = dataset_scene(loaded, SCORE_SEED, index)
        images.append(square_pixels(degrade(draw(scene)[0], rng), IMAGE_SIZE))
        captions.append(plain(scene))
    return np.stack(images), captions


def read_held_out(
    reader: Reader, encoder: Encoder, *, count: int, assets: Path | None
) -> ReadingScores:
    """Caption held-out scenes and compare with the words that they show."""
    images, captions = _held_out(count, assets)
    device = reader.lm_head.weight.device
    texts = caption(reader, encoder, torch.from_numpy(images).to(device), DESCRIBE)
    return ReadingScores(
        held_out_word_recall=round(word_recall(captions, texts), 4),
        held_out_character_error_rate=round(character_error_rate(captions, texts), 4),
        held_out_images=count,
    )


@torch.no_grad()
def caption(
    reader: Reader,
    encoder: Encoder,
    images: Tensor,
    question: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Answer a question about uint8 images [b, h, w, 3], greedily."""
    device = images.device
    prefix = torch.tensor(encoder.prefix(), device=device)
    before = len(prefix) + reader.shape.patches
    tail = torch.tensor(encoder.question(question), device=device).expand(len(images), -1)
    asked = tail.shape[1]
    features = reader.see(clip_normalize(images))
    ended = torch.zeros(len(images), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        segments = torch.ones_like(tail)
        positions = torch.arange(tail.shape[1], device=device).expand_as(tail) + before
        mask = attention_mask(segments, before)
        logits = reader.read(features, prefix, tail, positions, mask)
        following = torch.where(ended, EOS_ID, logits[:, -1].argmax(-1))
        tail = torch.cat((tail, following[:, None]), dim=1)
        ended = ended | (following == EOS_ID)
        if bool(ended.all()):
            break
    return [_text(encoder, row) for row in tail[:, asked:].tolist()]


def _text(encoder: Encoder, ids: list[int]) -> str:
    if EOS_ID in ids:
        ids = ids[: ids.index(EOS_ID)]
    text: str = encoder.tokenizer.decode(ids)
    return text
