"""LLaVA-1.6: a picture of any shape is seen whole, and again in tiles of full resolution.

The tiles' features are one picture again: what only pads is cut away, and each row ends with the
model's newline. Source: https://llava-vl.github.io/blog/2024-01-30-llava-next, LLaVA's
llava/mm_utils.py (process_anyres_image) and llava/model/llava_arch.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from llava_ray.models.family import Family, VisionShape
from llava_ray.models.images import ImagePixels

if TYPE_CHECKING:
    import torch

_DEFAULT_GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class LlavaNext(Family):
    """transformers' LlavaNextForConditionalGeneration."""

    side: int
    """Patches along a side of a tile."""
    grid: tuple[tuple[int, int], ...]
    """Heights and widths in pixels of which one is chosen for a picture."""

    @classmethod
    def read(cls, tree: Mapping[str, Any], vision: VisionShape) -> Self:
        """Read image_grid_pinpoints."""
        size = vision.image_size
        side = size // int(tree["vision_config"]["patch_size"])
        pairs = tree.get("image_grid_pinpoints") or _DEFAULT_GRID
        try:
            grid = tuple((int(height), int(width)) for height, width in pairs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"image_grid_pinpoints is {pairs!r}, not a list of heights and widths in pixels"
            ) from error
        if vision.tokens != side**2:
            raise ValueError(
                f"a tile of {side}x{side} patches gives {vision.tokens} features, which make no "
                "picture: vision_feature_select_strategy must drop the class token, and only that"
            )
        for height, width in grid:
            if height % size or width % size or not height * width:
                raise ValueError(f"image_grid_pinpoints: {height}x{width} is not tiles of {size}")
        return cls(vision, side, grid)

    @property
    def max_image_tokens(self) -> int:
        """Those of a picture that fills the largest grid."""
        return max(self._tokens(height, width, height, width) for height, width in self.grid)

    def image_tokens(self, height: int, width: int) -> int:
        """Count the whole picture's patches, the tiles' without padding, and a newline a row."""
        return self._tokens(height, width, *self._best(height, width))

    def pixels(self, image: Image.Image) -> ImagePixels:
        """Return the whole picture squeezed to a square, then the tiles of the best grid."""
        size = self.vision.image_size
        height, width = self._best(image.height, image.width)
        scale = min(width / image.width, height / image.height)
        # The side that fits is the grid's own, whatever the product rounds to.
        fits_width = width / image.width < height / image.height
        inner = (
            width if fits_width else min(math.ceil(image.width * scale), width),
            min(math.ceil(image.height * scale), height) if fits_width else height,
        )
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            image.resize(inner, Image.Resampling.BICUBIC),
            ((width - inner[0]) // 2, (height - inner[1]) // 2),
        )
        tiles = np.asarray(canvas).reshape(height // size, size, width // size, size, 3)
        whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        return ImagePixels(
            np.concatenate([whole[None], tiles.swapaxes(1, 2).reshape(-1, size, size, 3)]),
            self._tokens(image.height, image.width, height, width),
            (image.height, image.width),
        )

    def inputs(
        self, images: Sequence[ImagePixels], device: str = "cpu"
    ) -> "dict[str, torch.Tensor]":
        """Return `image_sizes` [images, 2] too, on the CPU, where they are read."""
        import torch

        sizes = torch.tensor([image.size for image in images]).reshape(-1, 2)
        return {**super().inputs(images, device), "image_sizes": sizes}

    def image_processor(self) -> dict[str, Any]:
        """Add the grids."""
        side = self.vision.image_size
        return {
            **super().image_processor(),
            "image_processor_type": "LlavaNextImageProcessor",
            "crop_size": {"height": side, "width": side},
            "image_grid_pinpoints": [list(size) for size in self.grid],
        }

    def obstacle(self, method: str) -> str:
        """Refuse GGUF."""
        if method == "gguf":
            return "llama.cpp drops LLaVA-1.6's newline tokens and keeps what only pads"
        return ""

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid that keeps most pixels, and of those the smallest."""

        def rank(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.grid, key=rank)

    def _tokens(self, height: int, width: int, grid_height: int, grid_width: int) -> int:
        size = self.vision.image_size
        rows, columns = grid_height // size * self.side, grid_width // size * self.side
        # As transformers' unpad_image rounds.
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return self.vision.tokens + rows * columns + rows
