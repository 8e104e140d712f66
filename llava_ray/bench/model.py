"""LLaVA-1.5-7B's shapes with random weights, and quick roundings of its language model.

For speed alone: random weights say nothing of a method's quality, so rows name the layout.
"""

from typing import Any, Literal

import numpy as np
import torch

from llava_ray.inference.engine import Prompt
from llava_ray.inference.torch.kernels.weights import PackedLinear, Unpacked, pack, unpack

Layout = Literal["fp16", "int8", "awq-g128", "hqq-g64"]

IMAGE_TOKEN = 32000
IMAGE_SIZE, PATCH_SIZE = 336, 14
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2


def build_model(device: str, dtype: torch.dtype, layers: int = 32) -> Any:
    """Return Vicuna-7B with CLIP ViT-L/14-336 and a projector, weights drawn on the device."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=768,
        ).to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def make_prompt(tokens: int, seed: int = 0) -> Prompt:
    """Return a prompt of one random image and random text."""
    rng = np.random.default_rng(seed)
    text = [int(token) for token in rng.integers(100, 31000, tokens - TOKENS_PER_IMAGE - 1)]
    pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Prompt((1, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, *text), (pixels,))


def round_linears(model: Any, layout: Layout) -> dict[str, PackedLinear]:
    """Round the decoder's linears in place; return the packed modules by name.

    The model keeps the rounded values as 16-bit weights, the reference for the packed ones.
    """
    packed: dict[str, PackedLinear] = {}
    if layout == "fp16":
        return packed
    for name, module in model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            values = rounded(module.weight.data.float(), layout)
            packed[name] = PackedLinear(pack(values))
            module.weight.data.copy_(unpack(packed[name].packed, torch.float32))
    return packed


def replace_linears(model: Any, packed: dict[str, PackedLinear]) -> None:
    """Put the packed modules in the place of the 16-bit ones."""
    layers = model.model.language_model.layers
    for name, module in packed.items():
        owner, _, attribute = name.rpartition(".")
        setattr(layers.get_submodule(owner), attribute, module)


def rounded(matrix: torch.Tensor, layout: Layout) -> Unpacked:
    """Round to the nearest code: symmetric per row (int8), or between a group's extremes.

    AWQ's zero points are integers, hqq's are not; neither method's search is run.
    """
    rows, columns = matrix.shape
    if layout == "int8":
        scales = matrix.abs().amax(dim=1, keepdim=True) / 127
        codes = (matrix / scales).round() + 128
        zeros = torch.full_like(scales, 128)
        return Unpacked(codes.to(torch.uint8), scales, zeros, 8, "int8 per row")
    group = 128 if layout == "awq-g128" else 64
    grouped = matrix.view(rows, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (high - low) / 15
    zeros = -low / scales
    if layout == "awq-g128":
        zeros = zeros.round().clamp(0, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return Unpacked(codes.to(torch.uint8).view(rows, columns), scales, zeros, 4, layout)
