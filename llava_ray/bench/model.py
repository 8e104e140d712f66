"""LLaVA-1.5-7B's shapes with random weights, and quick roundings of its language model.

For speed alone: random weights say nothing of a method's quality, so rows name the layout.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llava_ray.inference.engine import Prompt
from llava_ray.inference.torch.kernels.weights import PackedLinear, Unpacked, pack, unpack
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.images import ImagePixels
from llava_ray.models.shapes import LLAVA_7B, random_model
from llava_ray.models.sizes import Sizes
from llava_ray.models.tensors import SHARD_BYTES, copy_sidecars

Layout = Literal["fp16", "int8", "awq-g128", "hqq-g64"]


def write_model(folder: Path, device: str) -> Path:
    """Write LLaVA-1.5-7B's shapes in fp16, random, with the embedded model's tokenizer."""
    own = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    tree = {**LLAVA_7B, "image_token_index": own["image_token_index"]}
    random_model(tree, device, torch.float16).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    copy_sidecars(EMBEDDED, folder)
    return folder


def make_prompt(tokens: int, seed: int = 0) -> Prompt:
    """Return a prompt of one random image and random text, for LLAVA_7B."""
    rng = np.random.default_rng(seed)
    vision, image_tokens = LLAVA_7B["vision_config"], Sizes.of(LLAVA_7B).image_tokens
    text = rng.integers(100, 31000, tokens - image_tokens - 1).tolist()
    size = vision["image_size"]
    tiles = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    image = ImagePixels(tiles, image_tokens, (size, size))
    return Prompt((1, *[LLAVA_7B["image_token_index"]] * image_tokens, *text), (image,))


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


def rounded(matrix: torch.Tensor, layout: Layout) -> Unpacked:
    """Round to the nearest code: symmetric per row (int8), or between a group's extremes.

    AWQ's zero points are integers, hqq's are not; neither method's search is run.
    """
    rows, columns = matrix.shape
    if layout == "int8":
        scales = matrix.abs().amax(dim=1, keepdim=True) / 127
        codes = (matrix / scales).round() + 128
        zeros = torch.full_like(scales, 128)
        return Unpacked(codes.to(torch.uint8), scales, zeros, 8)
    group = 128 if layout == "awq-g128" else 64
    grouped = matrix.view(rows, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (high - low) / 15
    zeros = -low / scales
    if layout == "awq-g128":
        zeros = zeros.round().clamp(0, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return Unpacked(codes.to(torch.uint8).view(rows, columns), scales, zeros, 4)
