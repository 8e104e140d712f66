"""Pixels of one square as an engine takes them."""

import numpy as np

from llava_ray.inference.engine import Engine
from llava_ray.models.images import ImagePixels, Pixels


def square(pixels: Pixels, tokens: int = 4) -> ImagePixels:
    """Return [size, size, 3] as a picture of one tile."""
    return ImagePixels(pixels[None], tokens, (pixels.shape[0], pixels.shape[1]))


def random_picture(engine: Engine, draw: np.random.Generator) -> ImagePixels:
    """Return noise of the size that an engine's vision tower sees."""
    size = engine.family.vision.image_size
    pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return square(pixels, engine.family.vision.tokens)
