"""LLaVA-1.5: a picture is padded to one square, and every picture takes as many tokens."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_ray.models.family import Family
from llava_ray.models.images import ImagePixels, square_pixels


@dataclass(frozen=True)
class Llava(Family):
    """transformers' LlavaForConditionalGeneration."""

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

    def image_processor(self) -> dict[str, Any]:
        """Have pictures padded, which llava-hf's own folders leave out."""
        padded = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        return {**super().image_processor(), **padded, "do_center_crop": False}
