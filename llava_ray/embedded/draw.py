"""From a scene to pixels, with the centre of every glyph.

Text is drawn at its final size on a flat body, which is then tilted into place: one small
perspective transform per sign keeps a picture at a few milliseconds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

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
        body, flat = _draw_body(sign, index)
        matrix = _homography(sign)
        _paste(image, body, sign, matrix)
        points = np.array([(glyph.x, glyph.y, 1.0) for glyph in flat]) @ matrix.T
        for glyph, (x, y) in zip(flat, points[:, :2] / points[:, 2:], strict=True):
            glyphs.append(replace(glyph, x=float(x), y=float(y)))
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


def _draw_body(sign: Sign, number: int) -> tuple[Image.Image, list[Glyph]]:
    """Draw a sign flat; return it with its glyphs' centres in its own pixels."""
    width, height = sign.body
    body = Image.new("RGBA", (width + 2 * EDGE, height + 2 * EDGE), (*sign.rgb, 0))
    pen = ImageDraw.Draw(body)
    _draw_frame(pen, sign, (EDGE, EDGE, EDGE + width - 1, EDGE + height - 1))
    font = open_font(sign.face.path, sign.size)
    line_height = sign.size * 1.25
    top = EDGE + (height - line_height * len(sign.lines)) / 2
    glyphs: list[Glyph] = []
    position = 0
    for line in sign.lines:
        advances = sign.face.advances(line, sign.size)
        left = EDGE + (width - sum(advances)) / 2
        middle = top + line_height / 2
        pen.text((left, middle), line, font=font, fill=sign.text_rgb, anchor="lm")
        for letter, advance in zip(line, advances, strict=True):
            if letter != " ":
                glyphs.append(Glyph(left + advance / 2, middle, letter, position, number))
            left += advance
            position += 1
        position += 1
        top += line_height
    return body, glyphs


def _draw_frame(pen: ImageDraw.ImageDraw, sign: Sign, box: Box) -> None:
    """Draw what makes a sign's kind, around the place of its text."""
    left, top, right, bottom = box
    tall, fill = bottom - top, sign.rgb
    match sign.kind:
        case "sign":
            pen.rounded_rectangle(box, 4, fill=fill, outline=sign.text_rgb, width=2)
        case "poster":
            pen.rectangle(box, fill=fill)
            for x in (left + 3, right - 3):
                pen.ellipse((x - 2, top + 1, x + 2, top + 5), fill=(150, 30, 30))
        case "label":
            pen.rounded_rectangle(box, tall / 3, fill=fill)
        case "plate":
            pen.rectangle(box, fill=fill, outline=(170, 172, 176), width=3)
        case "billboard":
            pen.rectangle(box, fill=fill, outline=(40, 40, 44), width=3)
            for share in (0.2, 0.5, 0.8):
                x = left + share * (right - left)
                pen.rectangle((x - 3, top - 2, x + 3, top + 3), fill=(255, 240, 180))
        case "ticket":
            pen.rectangle(box, fill=fill)
            for y in range(int(top), int(bottom), 6):
                for x in (left, right):
                    pen.ellipse((x - 2, y, x + 2, y + 4), fill=(0, 0, 0, 0))
        case "screen":
            pen.rounded_rectangle(box, 3, fill=fill, outline=(16, 16, 18), width=4)
            pen.rectangle((right - 9, bottom - 2, right - 5, bottom - 1), fill=(60, 230, 90))
        case "box":
            dark = (int(fill[0] * 0.6), int(fill[1] * 0.6), int(fill[2] * 0.6))
            pen.rectangle(box, fill=fill)
            pen.rectangle((left, top, right, top + 3), fill=dark)
            pen.rectangle((right - 4, top, right, bottom), fill=dark)
        case "sticker":
            pen.rounded_rectangle(box, tall / 2, fill=(255, 255, 255))
            inner = (left + 2, top + 2, right - 2, bottom - 2)
            pen.rounded_rectangle(inner, tall / 2 - 2, fill=fill)
        case "banner":
            notch, middle = min(7.0, (right - left) / 12), (top + bottom) / 2
            tail, head = [(left, bottom), (left + notch, middle)], [(left, top), (right, top)]
            pen.polygon([*head, (right - notch, middle), (right, bottom), *tail], fill=fill)
        case "card":
            pen.rectangle(box, fill=fill)
            inner = (left + 3, top + 3, right - 3, bottom - 3)
            pen.rectangle(inner, outline=sign.text_rgb)


def _homography(sign: Sign) -> NDArray[np.float64]:
    """Return the 3x3 matrix from body pixels to picture pixels."""
    width, height = sign.body
    right, bottom = EDGE + width, EDGE + height
    flat = ((EDGE, EDGE), (right, EDGE), (right, bottom), (EDGE, bottom))
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


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    for points in _OUTLINES[thing.kind]:
        corners = [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]
        pen.polygon(corners, fill=thing.rgb, outline=(30, 30, 30))
    if thing.kind == "ball":
        pen.ellipse(thing.box, fill=thing.rgb, outline=(30, 30, 30))
        pen.arc((left - 8, top + 4, right - 12, bottom + 4), 270, 60, fill=(255, 255, 255), width=2)
    if thing.kind == "heart":
        half = (left + right) / 2
        for start in (left, half):
            pen.ellipse((start, top, start + half - left, top + half - left), fill=thing.rgb)


_STAR: list[Point] = [
    (0.5 + radius * np.sin(turn * np.pi / 5), 0.5 - radius * np.cos(turn * np.pi / 5))
    for turn, radius in zip(range(10), (0.5, 0.2) * 5, strict=True)
]
_OUTLINES: dict[str, list[list[Point]]] = {
    "ball": [],
    "star": [_STAR],
    "tree": [
        [(0.44, 0.6), (0.56, 0.6), (0.56, 1), (0.44, 1)],
        [(0.5, 0), (0.95, 0.7), (0.05, 0.7)],
    ],
    "arrow": [[(0, 0.35), (0.6, 0.35), (0.6, 0.1), (1, 0.5), (0.6, 0.9), (0.6, 0.65), (0, 0.65)]],
    "heart": [[(0.03, 0.38), (0.97, 0.38), (0.5, 1)]],
    "lamp": [
        [(0.3, 0), (0.7, 0), (1, 0.5), (0, 0.5)],
        [(0.46, 0.5), (0.54, 0.5), (0.54, 0.92), (0.46, 0.92)],
        [(0.25, 0.9), (0.75, 0.9), (0.75, 1), (0.25, 1)],
    ],
}
"""Polygons of things, in the unit square."""


def draw_background(scene: Scene) -> Image.Image:
    """Draw the scene's background from its seed."""
    image = Image.new("RGB", (scene.width, scene.height))
    rng = random.Random(scene.background_seed)
    _BACKGROUNDS[scene.background](rng, ImageDraw.Draw(image), scene.width, scene.height)
    return image


def _near(rng: random.Random, colour: Colour, spread: int) -> Colour:
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, value + shift)) for value in colour)
    return red, green, blue


def _bricks(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.rectangle((0, 0, width, height), fill=_near(rng, (190, 184, 174), 14))
    base = _near(rng, rng.choice(((150, 72, 54), (164, 90, 66), (132, 60, 48))), 12)
    tall = rng.randint(10, 18)
    wide = int(tall * 2.3)
    for row, y in enumerate(range(rng.randint(-tall, 0), height, tall)):
        for x in range(-wide + (row % 2) * wide // 2 - rng.randint(0, 3), width, wide):
            pen.rectangle((x, y, x + wide - 3, y + tall - 3), fill=_near(rng, base, 12))


def _boards(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    base = _near(rng, rng.choice(((158, 116, 70), (128, 88, 50), (186, 148, 100))), 12)
    pen.rectangle((0, 0, width, height), fill=base)
    wide = rng.randint(22, 44)
    for x in range(rng.randint(-wide, 0), width, wide):
        pen.rectangle((x, 0, x + wide - 2, height), fill=_near(rng, base, 12))
        for _ in range(5):
            grain = x + rng.randint(2, wide - 3)
            start = rng.randint(0, height)
            pen.line((grain, start, grain, start + rng.randint(20, 90)), fill=_near(rng, base, 26))


def _tiles(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    base = _near(rng, rng.choice(((214, 220, 222), (150, 190, 196), (222, 214, 190))), 12)
    pen.rectangle((0, 0, width, height), fill=_near(rng, (120, 120, 120), 30))
    side = rng.randint(16, 32)
    for y in range(rng.randint(-side, 0), height, side):
        for x in range(rng.randint(-2, 0) - side // 2, width, side):
            pen.rectangle((x, y, x + side - 2, y + side - 2), fill=_near(rng, base, 6))


def _plain_wall(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    colours = ((222, 214, 196), (180, 204, 214), (206, 186, 190), (196, 210, 180), (238, 236, 230))
    pen.rectangle((0, 0, width, height), fill=_near(rng, rng.choice(colours), 12))


def _concrete(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    base = _near(rng, (146, 146, 142), 18)
    pen.rectangle((0, 0, width, height), fill=base)
    for _ in range(40):
        x, y, radius = rng.randint(0, width), rng.randint(0, height), rng.randint(1, 6)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_near(rng, base, 12))
    crack = [(rng.randint(0, width), 0)]
    while crack[-1][1] < height:
        x, y = crack[-1]
        crack.append((x + rng.randint(-14, 14), y + rng.randint(12, 30)))
    pen.line(crack, fill=_near(rng, (84, 84, 82), 10), width=1)


def _lawn(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.rectangle((0, 0, width, height), fill=_near(rng, (140, 190, 232), 14))
    horizon = int(height * rng.uniform(0.25, 0.5))
    green = _near(rng, (86, 140, 58), 14)
    pen.rectangle((0, horizon, width, height), fill=green)
    for _ in range(70):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        pen.line((x, y, x + rng.randint(-3, 3), y - rng.randint(3, 7)), fill=_near(rng, green, 30))
    for _ in range(2):
        x, y = rng.randint(0, width), rng.randint(0, horizon // 2)
        pen.ellipse((x, y, x + 40, y + 12), fill=(240, 244, 248))


def _street(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.rectangle((0, 0, width, height), fill=_near(rng, (176, 196, 214), 20))
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


def _shelf(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.rectangle((0, 0, width, height), fill=_near(rng, (226, 222, 212), 12))
    tall = height // rng.choice((2, 3))
    for y in range(tall, height + tall, tall):
        x = rng.randint(0, 6)
        while x < width:
            wide, high = rng.randint(10, 26), rng.randint(tall // 3, tall - 12)
            colour = (rng.randint(90, 220), rng.randint(90, 220), rng.randint(90, 220))
            pen.rectangle((x, y - 6 - high, x + wide, y - 6), fill=colour)
            x += wide + rng.randint(2, 8)
        pen.rectangle((0, y - 6, width, y), fill=_near(rng, (132, 96, 60), 10))


_BACKGROUNDS: dict[str, Callable[[random.Random, ImageDraw.ImageDraw, int, int], None]] = {
    "a brick wall": _bricks, "a wooden wall": _boards, "a tiled wall": _tiles,
    "a plain wall": _plain_wall, "a concrete wall": _concrete, "a green lawn": _lawn,
    "a city street": _street, "a store shelf": _shelf,
}  # fmt: skip
