"""Pixels as people see them (C1 to C4), of every mode and format that Pillow writes."""

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw

from llava_ray.errors import DataError
from llava_ray.models import rgb
from llava_ray.models.rgb import open_image

Colour = tuple[int, int, int]
COLOURS: list[Colour] = [(200, 30, 40), (20, 160, 60), (30, 50, 220), (240, 230, 20)]
"""Of the quarters of a picture: above left, above right, below left, below right."""
LOSSY = {"JPEG": 14, "WEBP": 14, "AVIF": 14}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def quarters(size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    half = size[0] // 2, size[1] // 2
    for index, colour in enumerate(COLOURS):
        x, y = index % 2 * half[0], index // 2 * half[1]
        draw.rectangle((x, y, x + half[0] - 1, y + half[1] - 1), fill=colour)
    return image


def seen(data: bytes) -> list[Colour]:
    """Return the colours in the middle of the quarters."""
    image = open_image(data, max_pixels=10**7)
    assert image.mode == "RGB"
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    return [image.getpixel(place) for place in places]  # type: ignore[misc]


def near(found: list[Colour], wanted: list[Colour], tolerance: int = 2) -> bool:
    return int(np.abs(np.array(found) - np.array(wanted)).max()) <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(kind: str, orientation: int) -> None:
    """C1"""
    upright = quarters()
    undo = rgb._UPRIGHT.get(orientation)
    stored = upright
    if undo is not None:
        inverse = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
                   Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}  # fmt: skip
        stored = upright.transpose(inverse.get(undo, undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif)
    assert open_image(data, max_pixels=10**6).size == upright.size
    assert near(seen(data), COLOURS, LOSSY.get(kind, 2))


def test_broken_exif_leaves_the_picture() -> None:
    data = encode(quarters(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert near(seen(data), COLOURS, 14)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_is_transparent_lies_over_white(kind: str) -> None:
    """C2"""
    letters = quarters().convert("RGBA")
    letters.paste((0, 0, 0, 0), (0, 0, 32, 24))
    options = {"lossless": True} if kind == "WEBP" else {}
    found = seen(encode(letters, kind, **options))
    assert near(found, [(255, 255, 255), *COLOURS[1:]], 40 if kind == "GIF" else 2)


def test_half_transparent_and_colour_keys_lie_over_white() -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert near(seen(encode(half, "PNG")), [(127, 127, 127)] * 4)
    pair = Image.new("LA", (8, 8), (0, 0))
    assert near(seen(encode(pair, "PNG")), [(255, 255, 255)] * 4)
    key = Image.new("RGB", (8, 8), (1, 2, 3))
    assert near(seen(encode(key, "PNG", transparency=(1, 2, 3))), [(255, 255, 255)] * 4)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert near(seen(encode(palette, "PNG", transparency=0)), [(255, 255, 255)] * 4)
    bilevel = Image.new("1", (8, 8), 0)
    assert near(seen(encode(bilevel, "PNG", transparency=0)), [(255, 255, 255)] * 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_range(kind: str) -> None:
    """C3"""
    values = np.array([[0, 16448], [32896, 65535]], np.uint16).repeat(8, 0).repeat(8, 1)
    grey = [(v, v, v) for v in (0, 64, 128, 255)]
    assert near(seen(encode(Image.fromarray(values), kind)), grey, 1)


@pytest.mark.parametrize(
    ("values", "greys"),
    [
        (np.array([0, 0.25, 0.5, 1], np.float32), (0, 64, 128, 255)),
        (np.array([0, 64, 128, 255], np.float32), (0, 64, 128, 255)),
        (np.array([-100, 0, 100, 300], np.float32), (0, 64, 128, 255)),
        (np.array([0, np.nan, 0.5, 1], np.float32), (0, 0, 128, 255)),
        (np.array([0, 16448, 32896, 65535], np.int32), (0, 64, 128, 255)),
        (np.array([-1000, 0, 1000, 3000], np.int32), (0, 64, 128, 255)),
        (np.array([0, 64, 128, 255], np.int32), (0, 64, 128, 255)),
    ],
)
def test_floats_and_32_bit_greys_keep_theirs(values: Any, greys: tuple[int, ...]) -> None:
    """C3"""
    whole = values.reshape(2, 2).repeat(8, 0).repeat(8, 1)
    assert near(seen(encode(Image.fromarray(whole), "TIFF")), [(v, v, v) for v in greys], 1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_may_have_any_size(kind: bytes) -> None:
    """C4"""
    data = encode(quarters(), "PNG")
    large = zlib.compress(b"x" * 40_000_000)
    content = {
        b"tEXt": b"note\0" + b"x" * 4_000_000,
        b"zTXt": b"note\0\0" + large,
        b"iTXt": b"note\0\1\0\0\0" + large,
        b"iCCP": b"profile\0\0" + large,
    }[kind]
    head = len(rgb._PNG) + 25
    assert near(seen(data[:head] + _chunk(kind, content) + data[head:]), COLOURS)


def test_many_large_profiles_in_a_jpeg_are_read() -> None:
    """C4"""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(quarters(), "JPEG", icc_profile=profile + bytes(3_000_000))
    assert near(seen(data), COLOURS, 14)


def test_a_png_of_countless_chunks_is_refused() -> None:
    data = encode(quarters(), "PNG")
    many = _chunk(b"prVt", b"") * 200_000
    with pytest.raises(DataError, match="more than 100000 chunks"):
        seen(data[:33] + many + data[33:])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printers_colours_become_screens(kind: str) -> None:
    ink = quarters().convert("CMYK")
    assert near(seen(encode(ink, kind)), COLOURS, 14)
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert near(seen(encode(ink, kind, icc_profile=wrong)), COLOURS, 14)
    assert near(seen(encode(ink, kind, icc_profile=b"nonsense")), COLOURS, 14)


def test_lab_becomes_rgb() -> None:
    to_lab = ImageCms.profileToProfile(
        quarters(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert to_lab is not None
    assert near(seen(encode(to_lab, "TIFF")), COLOURS, 8)


def _writable() -> list[tuple[str, str]]:
    Image.init()
    pairs = []
    for kind in rgb._FORMATS:
        for mode in Image.MODES:
            try:
                encode(Image.new(mode, (8, 8)), kind)
            except (OSError, ValueError, KeyError, SystemError):
                continue
            pairs.append((kind, mode))
    return pairs


PAIRS = _writable()


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(PAIRS), st.integers(1, 40), st.integers(1, 40), st.data())
def test_every_mode_of_every_format_is_read(
    pair: tuple[str, str], width: int, height: int, data: st.DataObject
) -> None:
    kind, mode = pair
    raw = data.draw(st.binary(min_size=1, max_size=64))
    image = Image.new(mode, (width, height))
    size = len(image.tobytes())
    image.frombytes((raw * (size // len(raw) + 1))[:size])
    stored = encode(image, kind)
    found = open_image(stored, max_pixels=10**6)
    assert (found.mode, found.size) == ("RGB", (width, height))
    if mode in ("L", "1", "RGB") and kind not in LOSSY and kind != "GIF":
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PAIRS), st.data())
def test_damaged_pictures_are_data_errors(pair: tuple[str, str], data: st.DataObject) -> None:
    kind, mode = pair
    stored = bytearray(encode(Image.new(mode, (9, 7)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(stored[: data.draw(st.integers(0, len(stored)))])
    try:
        assert open_image(cut, max_pixels=10**6).mode == "RGB"
    except DataError as error:
        assert "\n" not in str(error)


def test_formats_that_need_an_extra_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    rgb._formats.cache_clear()
    try:
        with pytest.raises(DataError, match="HEIC picture: 'pip install pillow-heif'"):
            open_image(heic, max_pixels=10**6)
    finally:
        rgb._formats.cache_clear()


def test_heic_is_read_where_the_extra_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(quarters()).save(stream)
    assert near(seen(stream.getvalue()), COLOURS, 14)


def test_other_formats_are_named() -> None:
    slow = b"P3\n9 9\n255\n" + b"#a\n" * 1_000_000
    others = [encode(quarters(), kind) for kind in ("TGA", "ICO", "PPM", "JPEG2000")]
    for data in (*others, slow, b"%PDF-1.4", b"<svg/>"):
        with pytest.raises(DataError, match="not an image in one of JPEG, PNG"):
            open_image(data, max_pixels=10**6)


def tiff(values: np.ndarray[Any, Any], *, photometric: int = 1, bits: int | None = None) -> bytes:
    """Write an uncompressed TIFF of one strip as its values lie in memory, little-endian."""
    formats = {"u": 1, "i": 2, "f": 3}
    data = values.tobytes()
    width, height = values.shape[1], values.shape[0]
    depth = bits or 8 * values.dtype.itemsize
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, depth), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)),
        (339, 3, formats[values.dtype.kind]),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + directory + bytes(4)


U32 = 2**32 - 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(np.array([[0, 16384, 65535]], np.uint16), photometric=0), [255, 191, 0]),
        (tiff(np.array([[0, 0.5, 1]], np.float32), photometric=0), [255, 128, 0]),
        (tiff(np.array([[0, 0.5, 1.0001]], np.float32)), [0, 128, 255]),
        (tiff(np.array([[0, 1, 2]], np.float32)), [0, 128, 255]),
        (tiff(np.array([[0, 128, 255]], np.float32)), [0, 128, 255]),
        (tiff(np.array([[0, U32 // 4, U32]], np.uint32)), [0, 64, 255]),
        (tiff(np.array([[-128, 0, 127]], np.int8)), [0, 128, 255]),
        (tiff(np.array([[0, 16384, 32767]], np.int16)), [0, 128, 255]),
        (tiff(np.array([[0, 100, 300]], np.int32)), [0, 85, 255]),
    ],
)  # fmt: skip
def test_greys_of_tiff_keep_their_range(data: bytes, expected: list[int]) -> None:
    """C3"""
    found = np.asarray(open_image(data, max_pixels=100))[0, :, 0]
    assert np.abs(found.astype(int) - expected).max() <= 1


DEEP = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear"),
    [
        (2, 0, bytes([0b01000000]), struct.pack(">H", 1)),
        (4, 0, bytes([0b01010000]), struct.pack(">H", 5)),
        (16, 2, DEEP, DEEP),
    ],
)  # fmt: skip
def test_a_clear_colour_of_any_depth_lies_over_white(
    depth: int, colour: int, row: bytes, clear: bytes
) -> None:
    """C2"""
    head = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
    data = png_chunks(
        (b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    )
    assert open_image(data, max_pixels=100).getpixel((0, 0)) == (255, 255, 255)


def test_whatever_a_reader_raises_is_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a frame of no duration")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match="broken image: a frame of no duration"):
        open_image(b"anything", max_pixels=100)
