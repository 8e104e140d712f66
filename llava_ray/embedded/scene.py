"""What a generated picture shows: signs with exact words, colours, places and things beside them.

A scene is composed first and drawn later, so that captions and pixels come from one record.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_ray.embedded.fonts import Face
from llava_ray.embedded.words import WordList, number

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Point = tuple[float, float]
Style = Callable[[str], str]

COLOURS: dict[str, tuple[Colour, ...]] = {
    "black": ((12, 12, 14), (34, 32, 36)),
    "white": ((250, 250, 248), (236, 238, 234)),
    "grey": ((128, 130, 134), (150, 150, 150)),
    "red": ((200, 24, 28), (170, 16, 34)),
    "orange": ((240, 130, 20), (228, 108, 10)),
    "yellow": ((246, 214, 40), (252, 226, 84)),
    "green": ((24, 128, 56), (52, 148, 70)),
    "blue": ((26, 74, 180), (44, 102, 206)),
    "purple": ((108, 40, 146), (132, 66, 168)),
    "pink": ((244, 138, 176), (250, 164, 194)),
    "brown": ((106, 64, 32), (126, 80, 46)),
}

KINDS = ("sign", "poster", "label", "plate", "billboard", "ticket", "screen", "box", "sticker",
         "banner", "card")  # fmt: skip
THINGS = ("ball", "star", "tree", "arrow", "heart", "lamp")
BACKGROUNDS = ("a brick wall", "a wooden wall", "a tiled wall", "a plain wall", "a concrete wall",
               "a green lawn", "a city street", "a store shelf")  # fmt: skip

SMALLEST_TEXT = 18
"""Font size in pixels of a picture whose longer side is 224."""
LARGEST_TEXT = 76
MIN_CONTRAST = 80


@dataclass(frozen=True)
class Sign:
    """A flat thing with lines of text on it."""

    kind: str
    lines: tuple[str, ...]
    face: Face
    size: int
    colour: str
    rgb: Colour
    text_colour: str
    text_rgb: Colour
    place: str
    body: tuple[int, int]
    """Width and height before it is tilted."""
    corners: tuple[Point, Point, Point, Point]
    """In the picture: top left, top right, bottom right, bottom left."""
    shadow: bool

    @property
    def text(self) -> str:
        """All lines as one."""
        return " ".join(self.lines)


@dataclass(frozen=True)
class Thing:
    """An object without text."""

    kind: str
    colour: str
    rgb: Colour
    place: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """One picture, before it is drawn."""

    width: int
    height: int
    background: str
    background_seed: int
    signs: tuple[Sign, ...]
    """In reading order."""
    thing: Thing | None

    @property
    def words(self) -> list[str]:
        """Every word shown, in reading order."""
        return [word for sign in self.signs for word in sign.text.split()]


@dataclass(frozen=True)
class Level:
    """How hard scenes are, each from 0 (one large word) to 1."""

    clutter: float = 1.0
    """More signs, lines and smaller text."""
    tilt: float = 1.0
    nonsense: float = 0.0
    """Share of texts that are random letters, so that a reader learns to spell, not to guess."""


def compose(
    rng: random.Random, words: WordList, faces: Sequence[Face], size: tuple[int, int], level: Level
) -> Scene:
    """Draw a scene of a width and height in pixels; all that it shows depends on rng alone."""
    width, height = size
    cells = _cells(rng, level, width, height)
    thing_cell = rng.randrange(len(cells)) if len(cells) > 1 and rng.random() < 0.4 else None
    signs: list[Sign] = []
    thing = None
    scale = max(width, height) / 224
    kinds = rng.sample(KINDS, len(cells))
    for index, (cell, kind) in enumerate(zip(cells, kinds, strict=True)):
        place = _place(cell, width, height)
        if index == thing_cell:
            thing = _thing(rng, cell, place)
        else:
            signs.append(_sign(rng, words, rng.choice(faces), kind, cell, place, level, scale))
    background, background_seed = rng.choice(BACKGROUNDS), rng.randrange(2**31)
    return Scene(width, height, background, background_seed, tuple(signs), thing)


def _cells(rng: random.Random, level: Level, width: int, height: int) -> list[Box]:
    """Cut the picture into cells in reading order; each holds one sign or thing."""
    shapes: tuple[tuple[int, ...], ...] = ((1,), (1, 1), (2,), (1, 2), (2, 1), (1, 1, 1), (2, 2))
    weights = (5, 5 * level.clutter, 3 * level.clutter, 2 * level.clutter, 2 * level.clutter,
               3 * level.clutter, 1 * level.clutter)  # fmt: skip
    rows = rng.choices(shapes, weights)[0]
    margin = 0.02 * max(width, height)
    shares = [rng.uniform(0.8, 1.3) for _ in rows]
    cells: list[Box] = []
    top = margin
    for share, columns in zip(shares, rows, strict=True):
        row_height = (height - 2 * margin) * share / sum(shares)
        cut = width / 2 * rng.uniform(0.88, 1.12)
        edges = [margin, width - margin] if columns == 1 else [margin, cut, width - margin]
        for left, right in zip(edges, edges[1:], strict=False):
            cells.append((left + 2, top + 2, right - 2, top + row_height - 2))
        top += row_height
    return cells


def _place(cell: Box, width: int, height: int) -> str:
    across = (cell[0] + cell[2]) / 2 / width
    down = (cell[1] + cell[3]) / 2 / height
    vertical = "top" if down < 0.4 else "bottom" if down > 0.6 else ""
    horizontal = "left" if across < 0.4 else "right" if across > 0.6 else ""
    return f"{vertical} {horizontal}".strip() or "center"


def _thing(rng: random.Random, cell: Box, place: str) -> Thing:
    colour = rng.choice([name for name in COLOURS if name not in ("white", "grey")])
    side = min(cell[2] - cell[0], cell[3] - cell[1]) * rng.uniform(0.6, 0.9)
    left = rng.uniform(cell[0], cell[2] - side)
    top = rng.uniform(cell[1], cell[3] - side)
    box = (left, top, left + side, top + side)
    kind = rng.choice(THINGS)
    return Thing(kind=kind, colour=colour, rgb=_shade(rng, colour), place=place, box=box)


def _sign(
    rng: random.Random,
    words: WordList,
    face: Face,
    kind: str,
    cell: Box,
    place: str,
    level: Level,
    scale: float,
) -> Sign:
    width, height = cell[2] - cell[0], cell[3] - cell[1]
    smallest = SMALLEST_TEXT * scale
    lines = _lines(rng, words, face, (width, height), smallest, level)
    pad_x, pad_y = rng.uniform(0.25, 0.6) + 0.35 * (kind == "banner"), rng.uniform(0.2, 0.4)
    wide = max(face.width(line, 1) for line in lines) + 2 * pad_x
    tall = len(lines) * 1.25 + 2 * pad_y
    fits = min(width / wide, height / tall, LARGEST_TEXT * scale)
    lowest = max(smallest, fits * (0.9 - 0.5 * level.clutter))
    size = max(int(smallest), int(rng.uniform(min(lowest, fits), fits)))
    body = (max(8, round(size * wide)), max(8, round(size * tall)))
    colours = _pair(rng)
    corners = _corners(rng, body, cell, level.tilt)
    shadow = rng.random() < 0.4
    return Sign(kind, lines, face, size, *colours, place, body, corners, shadow)


def _lines(
    rng: random.Random, words: WordList, face: Face, area: Point, smallest: float, level: Level
) -> tuple[str, ...]:
    """Draw one to three lines that fit the area's width and height at the smallest size."""
    width, height = area
    room = int(height / smallest / 1.25 - 0.8)
    count = rng.choices((1, 2, 3), (6, 4 * level.clutter, level.clutter))[0]
    styles = (str.upper, str.upper, str.capitalize, str.lower)
    style = str.upper if face.capitals_only else rng.choice(styles)
    lines = []
    for _ in range(max(1, min(count, room))):
        for longest in (11, 9, 7, 6, 5, 4, 3, 2):
            line = _line(rng, words, longest, style, level)
            if face.width(line, smallest) + 1.25 * smallest <= width:
                break
        lines.append(line)
    return tuple(lines)


def _line(rng: random.Random, words: WordList, longest: int, style: Style, level: Level) -> str:
    chance = rng.random()
    if chance < level.nonsense:
        return style(words.letters(rng, longest))
    if chance > 1 - 0.12 * level.clutter:
        return number(rng, longest)
    text = style(words.word(rng, longest))
    if longest > 9 and rng.random() < 0.35 * level.clutter:
        second = style(words.word(rng, max(3, 14 - len(text))))
        return f"{text} & {second}" if rng.random() < 0.1 else f"{text} {second}"
    if len(text) < longest and rng.random() < 0.05:
        text += rng.choice("!?")
    return text


def _pair(rng: random.Random) -> tuple[str, Colour, str, Colour]:
    """Draw a sign's colour and a text colour that stands out from it."""
    while True:
        colour = rng.choice(("white", "black", *COLOURS))
        text_colour = rng.choice(("white", "white", "black", "black", *COLOURS))
        rgb, text_rgb = _shade(rng, colour), _shade(rng, text_colour)
        if abs(_luminance(rgb) - _luminance(text_rgb)) >= MIN_CONTRAST:
            return colour, rgb, text_colour, text_rgb


def _shade(rng: random.Random, colour: str) -> Colour:
    base = rng.choice(COLOURS[colour])
    shift = rng.randint(-10, 10)
    red, green, blue = (min(255, max(0, value + shift + rng.randint(-5, 5))) for value in base)
    return red, green, blue


def _luminance(rgb: Colour) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def _corners(
    rng: random.Random, body: tuple[int, int], cell: Box, tilt: float
) -> tuple[Point, Point, Point, Point]:
    """Place a body in its cell, turned and seen a little from the side."""
    width, height = body
    cell_width, cell_height = cell[2] - cell[0], cell[3] - cell[1]
    room = max(0.0, cell_height - height) + 4
    most = min(14.0, math.degrees(math.atan2(room, width))) * tilt
    angle = math.radians(rng.uniform(-most, most) if rng.random() < 0.7 else 0)
    wobble = 0.07 * tilt * min(height, 60)
    points = []
    for x, y in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)):
        x, y = x * width, y * height
        x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
        points.append((x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble)))
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    move_x = cell[0] - left + rng.random() * max(0.0, cell_width - (right - left))
    move_y = cell[1] - top + rng.random() * max(0.0, cell_height - (bottom - top))
    first, second, third, fourth = ((x + move_x, y + move_y) for x, y in points)
    return first, second, third, fourth
