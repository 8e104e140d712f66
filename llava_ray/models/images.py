"""From RGB to what a vision tower sees: squares of uint8, then floats by the tower's numbers.

Three preprocessings of LLaVA exist; this is that of LLaVA's trainer (image_aspect_ratio pad):
pad to a square with CLIP's mean colour, then resize. Training, benchmark and serving share it.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_ray.models.rgb import open_image

if TYPE_CHECKING:
    import torch

    from llava_ray.models.family import Family

# https://github.com/openai/CLIP: clip/clip.py, _transform
Colour = tuple[float, float, float]
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)

_LARGEST_REDUCTION = 16
"""Images longer than this many times the model's size are averaged down before padding."""

Pixels = NDArray[np.uint8]
"""[..., size, size, 3], RGB."""


@dataclass(frozen=True, eq=False)
class ImagePixels:
    """A picture as a model takes it, from `Family.pixels`."""

    tiles: Pixels
    """uint8 [tiles, size, size, 3]; LLaVA-1.5 has one."""
    num_tokens: int
    size: tuple[int, int]
    """The picture's own height and width, by which LLaVA-1.6 leaves out what only pads."""


def square_pixels(image: Image.Image, size: int, mean: Colour = CLIP_MEAN) -> Pixels:
    """Pad to a square with the tower's mean colour and resize with bicubic interpolation.

    Source: LLaVA, llava/mm_utils.py, expand2square.
    """
    side = max(image.size)
    if side > _LARGEST_REDUCTION * size:
        # A long thin image within the pixel limit would pad to a canvas of any size.
        image = image.reduce(-(-side // (_LARGEST_REDUCTION * size)))
        side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def read_pixels(files: "Iterable[bytes]", family: "Family", max_pixels: int) -> list[ImagePixels]:
    """Decode image files as a model takes them."""
    return [family.pixels(open_image(file, max_pixels=max_pixels)) for file in files]


def normalize(
    pixels: "NDArray[np.uint8]",
    device: str = "cpu",
    mean: Colour = CLIP_MEAN,
    std: Colour = CLIP_STD,
) -> "torch.Tensor":
    """Turn uint8 [..., size, size, 3] into float32 [..., 3, size, size] by the tower's numbers."""
    import torch

    values = torch.from_numpy(np.array(pixels)).to(device).float() / 255
    middle, spread = (torch.tensor(row, device=device) for row in (mean, std))
    return ((values - middle) / spread).movedim(-1, -3)


def jpeg_url(image: Image.Image, quality: int) -> str:
    """Return a data URL of the image as a JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
