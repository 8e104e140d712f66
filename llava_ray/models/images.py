"""From untrusted image bytes to the square pixels that every engine sees.

Three preprocessings of LLaVA exist; this is that of LLaVA's trainer (image_aspect_ratio pad):
pad to a square with CLIP's mean colour, then resize. Training, benchmark and serving share it.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from llava_ray.errors import DataError

if TYPE_CHECKING:
    import torch

# https://github.com/openai/CLIP: clip/clip.py, _transform
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# What Pillow's readers raise on broken files; not all of it is wrapped into OSError.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)

_LARGEST_REDUCTION = 16
"""Images longer than this many times the model's size are averaged down before padding."""

Pixels = NDArray[np.uint8]
"""[size, size, 3], RGB."""


def open_image(
    source: Path | bytes, *, max_pixels: int, allow_animation: bool = True
) -> Image.Image:
    """Decode the first frame as RGB, having checked format and size before any pixel is read.

    Raises DataError for what is no image, of another format, too large, truncated or a bomb, and
    for more than one frame unless animations are allowed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(stream, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"image of {width}x{height} pixels: at most {max_pixels} are allowed"
                    )
                # A JPEG with several pictures is a photo with its depth map or preview beside it.
                may_move = image.format in ("GIF", "PNG", "WEBP")
                if not allow_animation and may_move and getattr(image, "is_animated", False):
                    raise DataError(f"animated {image.format}: send one still image")
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"not an image in one of {', '.join(FORMATS)}") from error
    except FileNotFoundError as error:
        raise DataError(f"no image file at {source!r}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image of far more than {max_pixels} pixels, which are allowed") from error
    except _BROKEN as error:
        raise DataError(f"broken image: {error}") from error


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
