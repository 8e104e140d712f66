import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_ray.errors import DataError
from llava_ray.models.images import CLIP_MEAN, CLIP_STD, PAD_COLOUR, normalize, square_pixels
from llava_ray.models.rgb import open_image


def encode(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_padding_centres_the_image_on_clips_mean_colour() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels = square_pixels(image, 40)
    assert pixels.shape == (40, 40, 3)
    assert tuple(pixels[0, 0]) == PAD_COLOUR == (122, 116, 104)
    assert tuple(pixels[20, 20]) == (255, 0, 0)
    assert tuple(pixels[-1, 0]) == PAD_COLOUR


def test_pixels_equal_clips_own_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, resample=Image.Resampling.BICUBIC
    )
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(normalize(square_pixels(image, 32)), theirs, atol=1e-5, rtol=0)


def test_normalize_keeps_leading_dimensions() -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    values = normalize(pixels)
    assert values.shape == (2, 3, 4, 4)
    torch.testing.assert_close(values[0, 1, 0, 0].item(), -CLIP_MEAN[1] / CLIP_STD[1])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_allowed_formats_are_read(kind: str) -> None:
    image = open_image(encode(Image.new("RGB", (8, 6)), kind), max_pixels=100)
    assert image.size == (8, 6)
    assert image.mode == "RGB"


def test_too_many_pixels_are_refused_before_decoding() -> None:
    data = encode(Image.new("1", (5000, 5000)), "PNG")
    with pytest.raises(DataError, match="5000x5000 pixels: at most 1000"):
        open_image(data, max_pixels=1000)


def test_hostile_bytes_are_data_errors(tmp_path: Path) -> None:
    png = encode(Image.new("RGB", (64, 64), (9, 9, 9)), "PNG")
    for data in (b"", b"not an image", png[:60], png[:-30], png[:40] + b"\0" * 40):
        with pytest.raises(DataError):
            open_image(data, max_pixels=10_000)
    with pytest.raises(DataError, match="no image file"):
        open_image(tmp_path / "absent.png", max_pixels=1)


def test_a_long_thin_image_pads_to_a_small_canvas() -> None:
    pixels = square_pixels(Image.new("RGB", (4_000_000, 3), (255, 0, 0)), 32)
    assert pixels.shape == (32, 32, 3)
    assert tuple(pixels[0, 0]) == PAD_COLOUR
    image = Image.linear_gradient("L").resize((2049, 2049)).convert("RGB")
    near = square_pixels(image, 32).astype(int) - square_pixels(image.resize((512, 512)), 32)
    assert abs(near).max() <= 2


def test_animations_are_refused_on_demand() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        assert open_image(stream.getvalue(), max_pixels=100).size == (8, 8)
        with pytest.raises(DataError, match="animated"):
            open_image(stream.getvalue(), max_pixels=100, allow_animation=False)
