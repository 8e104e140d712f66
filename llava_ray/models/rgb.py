"""From untrusted image bytes to RGB: one way for training, calibration, benchmark and serving.

Photographs are turned upright, what is transparent lies over white, greys of more than 8 bits keep
their range, and printers' colours go through their own profile.
"""

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from llava_ray.errors import DataError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Of Pillow's those that are in use and whose readers take no more time than they have bytes."""
_FOR_PEOPLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC"
_MAY_MOVE = ("GIF", "PNG", "WEBP", "AVIF")
"""A JPEG or HEIC with several pictures is a photo with its depth map or preview beside it, a TIFF
the pages of a document."""
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

Image.MAX_IMAGE_PIXELS = None
"""Pillow's own limit; every size is checked here, by the reader's, before a pixel is read."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation: what undoes it."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
"""Of PNG's ancillary chunks those that change what is seen."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""TIFF's tags: the second is 0 where small values are white, the third 2 for signed ones."""
_MOST_CHUNKS = 100_000
"""Of a PNG; encoders write some thousands at most."""


def open_image(
    source: Path | bytes, *, max_pixels: int, allow_animation: bool = True
) -> Image.Image:
    """Decode the first frame as RGB, having checked format and size before any pixel is read.

    Raises DataError for what is no image, of another format, too large, truncated or a bomb, and
    for more than one frame unless animations are allowed.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What metadata and sizes are warned of is checked.
            with Image.open(io.BytesIO(_without_text(data)), formats=_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"image of {width}x{height} pixels: at most {max_pixels} are allowed"
                    )
                moves = image.format in _MAY_MOVE and getattr(image, "is_animated", False)
                if moves and not allow_animation:
                    raise DataError(f"animated {image.format}: send one still image")
                if image.format == "PNG":
                    _scale_clear_colour(image, depth=data[24])
                return _upright(image)
    except UnidentifiedImageError as error:
        raise DataError(_unknown(data)) from error
    except FileNotFoundError as error:
        raise DataError(f"no image file at {source!r}") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise anything, dividing by a file's zeros too.
        raise DataError(f"broken image: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    try:
        import pillow_heif
    except ImportError:
        return _FORMATS
    pillow_heif.register_heif_opener()
    return (*_FORMATS, "HEIF")


def _unknown(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and "HEIF" not in _formats():
        return "a HEIC picture: 'pip install pillow-heif' reads it, or convert it to JPEG"
    if data[:4] in _TIFF:
        return "a TIFF that is damaged or not read: save it with 8 or 16 bits a channel"
    return f"damaged, or not an image in one of {_FOR_PEOPLE}"


def _scale_clear_colour(image: Image.Image, *, depth: int) -> None:
    """Bring a PNG's transparent colour to 8 bits, as Pillow does with its pixels alone."""
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif isinstance(clear, tuple) and depth == 16:
        # Of 16 bits Pillow keeps the upper 8.
        image.info["transparency"] = tuple(part >> 8 for part in clear)


def _upright(image: Image.Image) -> Image.Image:
    """Return the pixels as RGB, turned as EXIF says."""
    image.load()  # Some readers turn the picture themselves, and say so only then.
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        orientation = None  # What is said of a picture may be broken where the picture is not.
    upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    found = _rgb(image)
    return found if upright is None else found.transpose(upright)


def _rgb(image: Image.Image) -> Image.Image:
    signed = image.mode == "L" and _first(getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, 1)) == 2
    if signed or image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image).convert("RGB")
    if image.mode in ("CMYK", "LAB"):
        return _by_profile(image)
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(whole, mask=whole.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Bring greys to 8 bits: of 16 bits by their range, others by that of their values."""
    tags = getattr(image, "tag_v2", {})
    bits = int(_first(tags.get(_BITS, 16)))
    pixels = np.asarray(image)
    if image.mode == "L":
        pixels = pixels.view(np.int8)
    elif image.mode == "I" and bits == 32 and _first(tags.get(_SAMPLE_FORMAT, 0)) == 1:
        pixels = pixels.view(np.uint32)
    values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    darkest, brightest = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    values = np.nan_to_num(values, nan=darkest, posinf=brightest, neginf=darkest)
    if image.mode == "L" or (bits == 16 and _first(tags.get(_SAMPLE_FORMAT, 0)) == 2):
        half = 2.0 ** (7 if image.mode == "L" else 15)
        low, high = (0.0 if darkest >= 0 else -half), half - 1
    else:
        low, high = _range(image.mode, bits, darkest, brightest)
    grey = (values - low) * (255 / max(high - low, 1e-9))
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8))


def _range(mode: str, bits: int, low: float, high: float) -> tuple[float, float]:
    """Return what is black and what is white, by a grey's mode and its darkest and brightest."""
    if mode.startswith("I;16"):
        return 0, 2 ** min(bits, 16) - 1
    # Floats go to 1 or 255, integers to 255 or 65535, a little over or far below by chance.
    tops = ((1, 0), (255, 16), (65535, 16384)) if mode == "F" else ((255, 0), (65535, 16384))
    for top, least in tops:
        if low >= -0.05 * top and least < high <= 1.05 * top:
            return 0, top
    return low, high


def _first(value: object) -> float:
    found = value[0] if isinstance(value, tuple) and value else value
    return found if isinstance(found, int | float) else 0


def _by_profile(image: Image.Image) -> Image.Image:
    """Turn printers' and Lab colours into sRGB, by the picture's own profile where it has one."""
    profile = image.info.get("icc_profile")
    try:
        if image.mode == "LAB":
            own = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif profile:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        found = None  # A broken profile, or one of other colours, says nothing of these.
    return image.convert("RGB") if found is None else found


def _without_text(data: bytes) -> bytes:
    """Return a PNG without its text and colour profile, of which Pillow takes 1 MiB at most."""
    if not data.startswith(_PNG):
        return data
    return _PNG + b"".join(_pixel_chunks(data))


def _pixel_chunks(data: bytes) -> Iterator[memoryview]:
    view, start = memoryview(data), len(_PNG)
    for _ in range(_MOST_CHUNKS):
        if start + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if kind[:1].isupper() or kind in _PNG_PIXELS:
            yield view[start:end]
        if kind == b"IEND":
            return
        start = end
    raise DataError(f"a PNG of more than {_MOST_CHUNKS} chunks")
