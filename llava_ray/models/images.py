"""From RGB to the square pixels that every engine sees.

Three preprocessings of LLaVA exist; this is that of LLaVA's trainer (image_aspect_ratio pad):
pad to a square with CLIP's mean colour, then resize. Training, benchmark and serving share it.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import torch

# https://github.com/openai/CLIP: clip/clip.py, _transform
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)

_LARGEST_REDUCTION = 16
"""Images longer than this many times the model's size are averaged down before padding."""

Pixels = NDArray[np.uint8]
"""[size, size, 3], RGB."""


def square_pixels(image: Image.Image, size: int) -> Pixels:
    """Pad to a square with CLIP's mean colour and resize with bicubic interpolation.

    Source: LLaVA, llava/mm_utils.py, expand2square.
    """
    side = max(image.size)
    if side > _LARGEST_REDUCTION * size:
        # A long thin image within the pixel limit would pad to a canvas of any size.
        image = image.reduce(-(-side // (_LARGEST_REDUCTION * size)))
        side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGB", (side, side), PAD_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def normalize(pixels: "NDArray[np.uint8]", device: str = "cpu") -> "torch.Tensor":
    """Turn uint8 [..., size, size, 3] into float32 [..., 3, size, size] by CLIP's mean and std."""
    import torch

    values = torch.from_numpy(np.array(pixels)).to(device).float() / 255
    mean, std = (torch.tensor(row, device=device) for row in (CLIP_MEAN, CLIP_STD))
    return ((values - mean) / std).movedim(-1, -3)
