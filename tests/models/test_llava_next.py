"""LLaVA-1.6's pixels and counts of tokens are those of transformers' own processor (D8)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_families import write_family
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_ray.errors import ConfigError, VariantError
from llava_ray.models.family import Family, family_from, family_of
from llava_ray.quantize.registry import spec_for

GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TREE: dict[str, Any] = {
    "model_type": "llava_next",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "image_grid_pinpoints": GRID,
}
SIZES = [(336, 336), (640, 480), (31, 17), (1, 900), (1500, 40), (1008, 336), (673, 671), (5, 5)]


@pytest.fixture(scope="module")
def family() -> Family:
    return family_from(TREE)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_processor(family: Family, size: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = LlavaNextImageProcessorPil(
        image_grid_pinpoints=GRID,
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
    )(image, return_tensors="pt")
    ours = family.inputs([family.pixels(image)])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"][0], atol=1e-5, rtol=0)
    assert torch.equal(ours["image_sizes"], theirs["image_sizes"])


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_tokens_are_as_many_as_the_processor_says(height: int, width: int) -> None:
    family = family_from(TREE)
    processor: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=GRID)
    expected = processor._get_number_of_features(height, width, 336, 336) - 1
    assert family.image_tokens(height, width) == expected <= family.max_image_tokens == 2928


def test_features_that_make_no_picture_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_family("llava-next", folder)
    tree = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("vision_feature_select_strategy", "full", "17 features, which make no picture"),
        ("image_grid_pinpoints", [[32, 60]], "32x60 is not tiles of 32"),
    ):
        (folder / "config.json").write_text(json.dumps(tree | {key: value}))
        with pytest.raises(ConfigError, match=message):
            family_of(folder)


def test_gguf_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_family("llava-next", tmp_path / "base")
    with pytest.raises(VariantError, match=r"gguf-f16.*llama.cpp drops LLaVA-1.6's newline"):
        spec_for("gguf-f16").check(tmp_path / "base")
