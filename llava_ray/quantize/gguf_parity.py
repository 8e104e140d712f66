"""Whether a GGUF pair computes what its Hugging Face folder does: logits, and cuts of text."""

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_ray.errors import VariantError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import encode_prompt
from llava_ray.models.family import family_of

if TYPE_CHECKING:
    import torch

    from llava_ray.inference.engine import Prompt

logger = logging.getLogger(__name__)

TOLERANCE = 1e-2
QUESTION = "Describe this image in detail."
ANSWER = 'A red sign above the door reads "Café 42 – OPEN".'

TEXTS = (
    "USER: <image>\nDescribe this image in detail. ASSISTANT:",
    ANSWER,
    "  two  spaces,\ttabs\nand\n\nnew lines  ",
    "https://example.org/a_b-c?d=1&e=%20 (1,234.50 €)",
    "Ünïcödé, 漢字, العربية, emoji 🦙🏽 and \u2060 joiners",
    "<s>USER: hi</s>USER: again <unk> <0x41>",
    "aaaaaaaaaaaaaaaa THE THE the tHe 0000000",
    "\n",
    " ",
)
"""What both tokenizers are to cut alike."""


def check_parity(merged: Path, pair: Path, *, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of logits between a folder in fp32 and its F32 GGUF pair.

    Both see the same pixels and a teacher-forced answer. Raises VariantError above `tolerance`.
    """
    from llava_ray.inference.engine import Prompt
    from llava_ray.inference.llama_cpp.engine import LlamaCppEngine

    family = family_of(pair)
    context = family.max_image_tokens + 256
    with closing(LlamaCppEngine(pair, device="cpu", slots=1, context=context)) as engine:
        image = family.pixels(probe_picture(family.vision.image_size))
        turns = [Turn(QUESTION, num_images=1)]
        ids = encode_prompt(engine.tokenizer, turns, [image.num_tokens])
        answer = engine.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        prompt = Prompt(tuple(ids), (image,))
        found = engine.score(prompt, answer)
    difference = float((found - reference_logits(merged, prompt, answer)).abs().max())
    if not difference <= tolerance:
        raise VariantError(
            f"the GGUF pair's logits differ from the merged model's by {difference:.3g}, more "
            f"than {tolerance:g}: the conversion does not fit this model"
        )
    return difference


def reference_logits(merged: Path, prompt: "Prompt", answer: list[int]) -> "torch.Tensor":
    """Return transformers' fp32 logits [len(answer), vocab] that predict the answer."""
    import torch
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    model.eval()
    shown = family_of(merged).inputs(prompt.images)
    with torch.no_grad():
        ids = torch.tensor([[*prompt.input_ids, *answer]])
        logits: torch.Tensor = model(input_ids=ids, **shown).logits[0]
    return logits[len(prompt.input_ids) - 1 : -1]


def probe_picture(size: int) -> Image.Image:
    """Return a picture whose every patch differs: coloured noise over a gradient."""
    noise = np.random.default_rng(0).integers(0, 128, (size, size, 3))
    slope = np.linspace(0, 127, size).astype(np.int64)
    return Image.fromarray((noise + slope[:, None, None]).astype(np.uint8))


def check_tokenization(text: Path) -> list[str]:
    """Return those of TEXTS that llama.cpp cuts differently from the tokenizer beside the file.

    They are logged too. Only llama.cpp's own tools are touched by them: the engine passes ids.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(text.parent / "tokenizer.json"))
    # Saved with the file; llama.cpp neither cuts nor fills up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    differing = []
    for sample, found in zip(TEXTS, llama_tokenize(text, TEXTS), strict=True):
        expected = tokenizer.encode(sample).ids
        if found != expected:
            differing.append(sample)
            logger.warning("llama.cpp cuts %r into %s, not %s", sample, found, expected)
    return differing


def llama_tokenize(text: Path, samples: tuple[str, ...]) -> list[list[int]]:
    """Cut samples by llama.cpp's tokenizer, reading special tokens as such."""
    from llava_ray.inference.llama_cpp.native import load_llama_cpp, open_model

    llama, model = load_llama_cpp(), open_model(text, vocab_only=True)
    try:
        vocab, ids, found = llama.llama_model_get_vocab(model), (llama.llama_token * 1024)(), []
        for sample in map(str.encode, samples):
            count = llama.llama_tokenize(vocab, sample, len(sample), ids, len(ids), True, True)
            assert count >= 0, f"{-count} tokens of {len(sample)} bytes"
            found.append(ids[:count])
        return found
    finally:
        llama.llama_model_free(model)
