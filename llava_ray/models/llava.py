"""LLaVA-1.5: a picture is padded to one square, and every picture takes as many tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from llava_ray.models.family import Family, VisionShape
from llava_ray.models.images import ImagePixels, normalize, square_pixels, stack_tiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Llava(Family):
    """transformers' LlavaForConditionalGeneration."""

    @classmethod
    def read(cls, tree: Mapping[str, Any], vision: VisionShape) -> Self:
        """Nothing else is needed."""
        return cls(vision)

    @property
    def max_image_tokens(self) -> int:
        """All pictures take as many."""
        return self.vision.tokens

    def image_tokens(self, height: int, width: int) -> int:
        """All pictures take as many."""
        return self.vision.tokens

    def pixels(self, image: Image.Image) -> ImagePixels:
        """Pad with the mean colour and resize."""
        square = square_pixels(image, self.vision.image_size, self.vision.mean)
        return ImagePixels(square[None], self.vision.tokens, (image.height, image.width))

    def inputs(
        self, images: Sequence[ImagePixels], device: str = "cpu"
    ) -> "dict[str, torch.Tensor]":
        """Return `pixel_values` alone."""
        tiles = stack_tiles(images, self.vision.image_size)
        return {"pixel_values": normalize(tiles, device, self.vision.mean, self.vision.std)}
