"""Prefill by CUDA graphs gives what the plain path gives, whatever ran before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import random_picture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llava_ray.inference.engine import Prompt  # noqa: E402
from llava_ray.inference.torch.engine import TorchEngine  # noqa: E402
from llava_ray.models.folder import EMBEDDED  # noqa: E402

CONTEXT = 512


@pytest.fixture(scope="module")
def engine() -> Any:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float16)
    made = TorchEngine(model.cuda(), folder=Path(EMBEDDED), device="cuda", slots=2, context=CONTEXT)
    made.warm_up()
    return made


def make_prompt(engine: Any, text: int, *, images: int, seed: int) -> Prompt:
    rng = np.random.default_rng(seed)
    pictures = tuple(random_picture(engine, rng) for _ in range(images))
    run = [engine.family.vision.image_token_id] * engine.family.vision.tokens * images
    words = [int(token) for token in rng.integers(3, 1000, text)]
    return Prompt((1, *run, *words), pictures)


@pytest.mark.parametrize(("text", "images"), [(200, 1), (3, 1), (40, 1), (7, 0), (500, 0), (60, 2)])
def test_logits_equal_those_of_the_plain_path(engine: Any, text: int, images: int) -> None:
    prompt = make_prompt(engine, text, images=images, seed=text)
    graphs, engine._graphs = engine._graphs, None
    slot, plain = engine.prefill(prompt)
    plain_next = engine.decode([slot], plain.argmax(-1, keepdim=True))
    engine.release(slot)
    engine._graphs = graphs
    slot, fast = engine.prefill(prompt)
    fast_next = engine.decode([slot], plain.argmax(-1, keepdim=True))
    engine.release(slot)
    for found, wanted in ((fast, plain), (fast_next, plain_next)):
        assert float((found - wanted).norm() / wanted.norm()) < 4e-3


def test_a_prompt_leaves_the_other_slot_alone(engine: Any) -> None:
    first = make_prompt(engine, 20, images=1, seed=1)
    slot, logits = engine.prefill(first)
    kept = engine._cache.keys[:, slot].clone()
    other, _ = engine.prefill(make_prompt(engine, 90, images=1, seed=2))
    assert other != slot
    assert torch.equal(engine._cache.keys[:, slot], kept)
    engine.release(slot)
    engine.release(other)
