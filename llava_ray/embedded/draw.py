"""From a scene to pixels, with the centre of every glyph.

Text is drawn at its final size on a flat body, which is then tilted into place: one small
perspective transform per sign keeps a picture at a few milliseconds.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from llava_ray.embedded.fonts import open_font
from llava_ray.embedded.scene import Box, Colour, Point, Scene, Sign, Thing

EDGE = 3
"""Transparent pixels around a body, so that its tilted edges are smooth."""


@dataclass(frozen=True)
class Glyph:
    """Where one character of a sign stands in the picture."""

    x: float
    y: float
    letter: str
    position: int
    """In the sign's text, spaces between words and lines counted."""
    sign: int


def draw(
    scene: Scene, background: Callable[[Scene], Image.Image] | None = None
) -> tuple[Image.Image, list[Glyph]]:
    """Return the picture and its glyphs; `background` replaces the drawn one."""
    image = (background or draw_background)(scene)
    if scene.thing:
        _draw_thing(ImageDraw.Draw(image), scene.thing)
    glyphs: list[Glyph] = []
    for index, sign in enumerate(scene.signs):
        body, centres = _draw_body(sign)
        matrix = _homography(sign)
        _paste(image, body, sign, matrix)
        glyphs += _moved(centres, sign, matrix, index)
    return image, glyphs


def degrade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add what a camera adds: blur, uneven light and noise."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(rng.randrange(2**31))
    height, width, _ = pixels.shape
    light = np.linspace(rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.1), width, dtype=np.float32)
    pixels = pixels * light[None, :, None]
    if rng.random() < 0.7:
        spread = rng.uniform(1, 9)
        pixels = pixels + spread * noise.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_body(sign: Sign) -> tuple[Image.Image, list[tuple[float, float, str, int]]]:
    width, height = sign.body
    body = Image.new("RGBA", (width + 2 * EDGE, height + 2 * EDGE), (*sign.rgb, 0))
    pen = ImageDraw.Draw(body)
    _BODIES[sign.kind](pen, sign, (EDGE, EDGE, EDGE + width - 1, EDGE + height - 1))
    font = open_font(sign.face.path, sign.size)
    line_height = sign.size * 1.25
    top = EDGE + (height - line_height * len(sign.lines)) / 2
    centres: list[tuple[float, float, str, int]] = []
    position = 0
    for line in sign.lines:
        advances = sign.face.advances(line, sign.size)
        left = EDGE + (width - sum(advances)) / 2
        middle = top + line_height / 2
        pen.text((left, middle), line, font=font, fill=(*sign.text_rgb, 255), anchor="lm")
        for letter, advance in zip(line, advances, strict=True):
            if letter != " ":
                centres.append((left + advance / 2, middle, letter, position))
            left += advance
            position += 1
        position += 1
        top += line_height
    return body, centres


def _plain(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rounded_rectangle(box, 4, fill=(*sign.rgb, 255), outline=(*sign.text_rgb, 255), width=2)


def _poster(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rectangle(box, fill=(*sign.rgb, 255))
    for x in (box[0] + 3, box[2] - 3):
        pen.ellipse((x - 2, box[1] + 1, x + 2, box[1] + 5), fill=(150, 30, 30, 255))


def _label(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rounded_rectangle(box, (box[3] - box[1]) / 3, fill=(*sign.rgb, 255))


def _plate(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rectangle(box, fill=(*sign.rgb, 255), outline=(170, 172, 176, 255), width=3)


def _billboard(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rectangle(box, fill=(*sign.rgb, 255), outline=(40, 40, 44, 255), width=3)
    for share in (0.2, 0.5, 0.8):
        x = box[0] + share * (box[2] - box[0])
        pen.rectangle((x - 3, box[1] - 2, x + 3, box[1] + 3), fill=(255, 240, 180, 255))


def _ticket(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rectangle(box, fill=(*sign.rgb, 255))
    for y in range(int(box[1]), int(box[3]), 6):
        for x in (box[0], box[2]):
            pen.ellipse((x - 2, y, x + 2, y + 4), fill=(0, 0, 0, 0))


def _screen(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rounded_rectangle(box, 3, fill=(*sign.rgb, 255), outline=(16, 16, 18, 255), width=4)
    pen.rectangle((box[2] - 9, box[3] - 2, box[2] - 5, box[3] - 1), fill=(60, 230, 90, 255))


def _box(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    red, green, blue = (int(value * 0.6) for value in sign.rgb)
    pen.rectangle(box, fill=(*sign.rgb, 255))
    pen.rectangle((box[0], box[1], box[2], box[1] + 3), fill=(red, green, blue, 255))
    pen.rectangle((box[2] - 4, box[1], box[2], box[3]), fill=(red, green, blue, 255))


def _sticker(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rounded_rectangle(box, (box[3] - box[1]) / 2, fill=(255, 255, 255, 255))
    inner = (box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2)
    pen.rounded_rectangle(inner, (box[3] - box[1]) / 2 - 2, fill=(*sign.rgb, 255))


def _banner(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    left, top, right, bottom = box
    notch, middle = min(7.0, (right - left) / 12), (top + bottom) / 2
    outline = [(left, top), (right, top), (right - notch, middle), (right, bottom), (left, bottom),
               (left + notch, middle)]  # fmt: skip
    pen.polygon(outline, fill=(*sign.rgb, 255))


def _card(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    pen.rectangle(box, fill=(*sign.rgb, 255))
    pen.rectangle((box[0] + 3, box[1] + 3, box[2] - 3, box[3] - 3), outline=(*sign.text_rgb, 255))


_BODIES: dict[str, Callable[[ImageDraw.ImageDraw, Sign, Box], None]] = {
    "sign": _plain, "poster": _poster, "label": _label, "plate": _plate, "billboard": _billboard,
    "ticket": _ticket, "screen": _screen, "box": _box, "sticker": _sticker, "banner": _banner,
    "card": _card,
}  # fmt: skip


def _homography(sign: Sign) -> NDArray[np.float64]:
    """Return the 3x3 matrix from body pixels to picture pixels."""
    width, height = sign.body
    flat = (
        (EDGE, EDGE),
        (EDGE + width, EDGE),
        (EDGE + width, EDGE + height),
        (EDGE, EDGE + height),
    )
    rows, values = [], []
    for (x, y), (to_x, to_y) in zip(flat, sign.corners, strict=True):
        rows.append((x, y, 1, 0, 0, 0, -x * to_x, -y * to_x))
        rows.append((0, 0, 0, x, y, 1, -x * to_y, -y * to_y))
        values += [to_x, to_y]
    solution = np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values))
    return np.append(solution, 1.0).reshape(3, 3)


def _paste(image: Image.Image, body: Image.Image, sign: Sign, matrix: NDArray[np.float64]) -> None:
    left = int(min(x for x, _ in sign.corners)) - EDGE
    top = int(min(y for _, y in sign.corners)) - EDGE
    right = int(max(x for x, _ in sign.corners)) + EDGE + 1
    bottom = int(max(y for _, y in sign.corners)) + EDGE + 1
    shift = np.array(((1, 0, left), (0, 1, top), (0, 0, 1)), dtype=np.float64)
    inverse = np.linalg.inv(matrix) @ shift
    inverse /= inverse[2, 2]
    tilted = body.transform(
        (right - left, bottom - top),
        Image.Transform.PERSPECTIVE,
        tuple(inverse.ravel()[:8]),
        Image.Resampling.BICUBIC,
    )
    mask = tilted.getchannel("A")
    if sign.shadow:
        dim = mask.point([value * 2 // 5 for value in range(256)])
        image.paste((0, 0, 0), (left + 4, top + 4), dim)
    image.paste(tilted, (left, top), mask)


def _moved(
    centres: Sequence[tuple[float, float, str, int]],
    sign: Sign,
    matrix: NDArray[np.float64],
    index: int,
) -> list[Glyph]:
    points = np.array([(x, y, 1.0) for x, y, _, _ in centres]) @ matrix.T
    points = points[:, :2] / points[:, 2:]
    return [
        Glyph(x=float(x), y=float(y), letter=letter, position=position, sign=index)
        for (x, y), (_, _, letter, position) in zip(points, centres, strict=True)
    ]


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    for points in _outlines(thing.kind):
        corners = [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]
        pen.polygon(corners, fill=thing.rgb, outline=(30, 30, 30))
    if thing.kind == "ball":
        pen.ellipse(thing.box, fill=thing.rgb, outline=(30, 30, 30))
        pen.arc((left - 8, top + 4, right - 12, bottom + 4), 270, 60, fill=(255, 255, 255), width=2)
    if thing.kind == "heart":
        half = (left + right) / 2
        for start in (left, half):
            pen.ellipse((start, top, start + half - left, top + half - left), fill=thing.rgb)


def _outlines(kind: str) -> Sequence[Sequence[Point]]:
    """Return polygons in the unit square."""
    star = [
        (0.5 + radius * np.sin(turn * np.pi / 5), 0.5 - radius * np.cos(turn * np.pi / 5))
        for turn, radius in zip(range(10), (0.5, 0.2) * 5, strict=True)
    ]
    shapes: dict[str, list[list[Point]]] = {
        "ball": [],
        "star": [star],
        "tree": [
            [(0.44, 0.6), (0.56, 0.6), (0.56, 1), (0.44, 1)],
            [(0.5, 0), (0.95, 0.7), (0.05, 0.7)],
        ],
        "arrow": [
            [(0, 0.35), (0.6, 0.35), (0.6, 0.1), (1, 0.5), (0.6, 0.9), (0.6, 0.65), (0, 0.65)]
        ],
        "heart": [[(0.03, 0.38), (0.97, 0.38), (0.5, 1)]],
        "lamp": [
            [(0.3, 0), (0.7, 0), (1, 0.5), (0, 0.5)],
            [(0.46, 0.5), (0.54, 0.5), (0.54, 0.92), (0.46, 0.92)],
            [(0.25, 0.9), (0.75, 0.9), (0.75, 1), (0.25, 1)],
        ],
    }
    return shapes[kind]


def draw_background(scene: Scene) -> Image.Image:
    """Draw the scene's background from its seed."""
    rng = random.Random(scene.background_seed)
    return _BACKGROUNDS[scene.background](rng, scene.width, scene.height)


def _canvas(width: int, height: int, colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def _near(rng: random.Random, colour: Colour, spread: int) -> Colour:
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, value + shift)) for value in colour)
    return red, green, blue


def _bricks(rng: random.Random, width: int, height: int) -> Image.Image:
    image, pen = _canvas(width, height, _near(rng, (190, 184, 174), 14))
    base = _near(rng, rng.choice(((150, 72, 54), (164, 90, 66), (132, 60, 48))), 12)
    tall = rng.randint(10, 18)
    wide = int(tall * 2.3)
    for row, y in enumerate(range(rng.randint(-tall, 0), height, tall)):
        for x in range(-wide + (row % 2) * wide // 2 - rng.randint(0, 3), width, wide):
            pen.rectangle((x, y, x + wide - 3, y + tall - 3), fill=_near(rng, base, 12))
    return image


def _boards(rng: random.Random, width: int, height: int) -> Image.Image:
    base = _near(rng, rng.choice(((158, 116, 70), (128, 88, 50), (186, 148, 100))), 12)
    image, pen = _canvas(width, height, base)
    wide = rng.randint(22, 44)
    for x in range(rng.randint(-wide, 0), width, wide):
        pen.rectangle((x, 0, x + wide - 2, height), fill=_near(rng, base, 12))
        for _ in range(5):
            grain = x + rng.randint(2, wide - 3)
            start = rng.randint(0, height)
            pen.line((grain, start, grain, start + rng.randint(20, 90)), fill=_near(rng, base, 26))
    return image


def _tiles(rng: random.Random, width: int, height: int) -> Image.Image:
    base = _near(rng, rng.choice(((214, 220, 222), (150, 190, 196), (222, 214, 190))), 12)
    image, pen = _canvas(width, height, _near(rng, (120, 120, 120), 30))
    side = rng.randint(16, 32)
    for y in range(rng.randint(-side, 0), height, side):
        for x in range(rng.randint(-2, 0) - side // 2, width, side):
            pen.rectangle((x, y, x + side - 2, y + side - 2), fill=_near(rng, base, 6))
    return image


def _plain_wall(rng: random.Random, width: int, height: int) -> Image.Image:
    colours = ((222, 214, 196), (180, 204, 214), (206, 186, 190), (196, 210, 180), (238, 236, 230))
    return _canvas(width, height, _near(rng, rng.choice(colours), 12))[0]


def _concrete(rng: random.Random, width: int, height: int) -> Image.Image:
    base = _near(rng, (146, 146, 142), 18)
    image, pen = _canvas(width, height, base)
    for _ in range(40):
        x, y, radius = rng.randint(0, width), rng.randint(0, height), rng.randint(1, 6)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_near(rng, base, 12))
    crack = [(rng.randint(0, width), 0)]
    while crack[-1][1] < height:
        x, y = crack[-1]
        crack.append((x + rng.randint(-14, 14), y + rng.randint(12, 30)))
    pen.line(crack, fill=_near(rng, (84, 84, 82), 10), width=1)
    return image


def _lawn(rng: random.Random, width: int, height: int) -> Image.Image:
    image, pen = _canvas(width, height, _near(rng, (140, 190, 232), 14))
    horizon = int(height * rng.uniform(0.25, 0.5))
    green = _near(rng, (86, 140, 58), 14)
    pen.rectangle((0, horizon, width, height), fill=green)
    for _ in range(70):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        pen.line((x, y, x + rng.randint(-3, 3), y - rng.randint(3, 7)), fill=_near(rng, green, 30))
    for _ in range(2):
        x, y = rng.randint(0, width), rng.randint(0, horizon // 2)
        pen.ellipse((x, y, x + 40, y + 12), fill=(240, 244, 248))
    return image


def _street(rng: random.Random, width: int, height: int) -> Image.Image:
    image, pen = _canvas(width, height, _near(rng, (176, 196, 214), 20))
    ground = int(height * rng.uniform(0.7, 0.85))
    x = -rng.randint(0, 30)
    while x < width:
        wide, top = rng.randint(36, 70), rng.randint(0, height // 3)
        wall = _near(rng, rng.choice(((150, 120, 100), (120, 124, 134), (172, 156, 130))), 16)
        pen.rectangle((x, top, x + wide, ground), fill=wall)
        for window_y in range(top + 8, ground - 14, 22):
            for window_x in range(x + 6, x + wide - 10, 16):
                pen.rectangle((window_x, window_y, window_x + 8, window_y + 11), fill=(64, 76, 92))
        x += wide
    pen.rectangle((0, ground, width, height), fill=_near(rng, (84, 84, 88), 10))
    for x in range(0, width, 40):
        pen.rectangle((x, ground + 14, x + 20, ground + 17), fill=(226, 226, 214))
    return image


def _shelf(rng: random.Random, width: int, height: int) -> Image.Image:
    image, pen = _canvas(width, height, _near(rng, (226, 222, 212), 12))
    tall = height // rng.choice((2, 3))
    for y in range(tall, height + tall, tall):
        x = rng.randint(0, 6)
        while x < width:
            wide, high = rng.randint(10, 26), rng.randint(tall // 3, tall - 12)
            colour = (rng.randint(90, 220), rng.randint(90, 220), rng.randint(90, 220))
            pen.rectangle((x, y - 6 - high, x + wide, y - 6), fill=colour)
            x += wide + rng.randint(2, 8)
        pen.rectangle((0, y - 6, width, y), fill=_near(rng, (132, 96, 60), 10))
    return image


_BACKGROUNDS: dict[str, Callable[[random.Random, int, int], Image.Image]] = {
    "a brick wall": _bricks, "a wooden wall": _boards, "a tiled wall": _tiles,
    "a plain wall": _plain_wall, "a concrete wall": _concrete, "a green lawn": _lawn,
    "a city street": _street, "a store shelf": _shelf,
}  # fmt: skip
