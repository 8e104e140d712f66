"""From a scene to the fixed-size arrays that pretraining moves to the GPU."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_ray.embedded.captions import Exchange, exchanges
from llava_ray.embedded.draw import Glyph, draw, draw_background
from llava_ray.embedded.scene import COLOURS, Level, Scene, compose
from llava_ray.embedded.scene_text import Assets
from llava_ray.embedded.vocabulary import EOS_ID, IMAGE_ID, load
from llava_ray.models.images import PAD_COLOUR

IMAGE_SIZE = 224
TAIL = 185
"""Tokens after the image: as many exchanges as fit. With 3 + 196 before them, 384 in all."""
GLYPHS = 96
QUOTED_WEIGHT = 3
"""Of a token inside quotes, against 1: words matter more than the phrases around them."""
STAGE_1_SHARE = 0.35
"""Of the whole run; LLaVA's first stage, here transcription of ever harder scenes."""

FIELDS: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
    "image": ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
    "ids": ((TAIL,), np.int16),
    "weights": ((TAIL,), np.uint8),
    "segments": ((TAIL,), np.uint8),
    "glyphs": ((GLYPHS, 7), np.uint8),
}
"""Glyph columns: x, y, letter (0 for none), position, sign, text colour, sign colour."""

COLOUR_IDS = {name: index for index, name in enumerate(COLOURS)}


@dataclass(frozen=True)
class Encoder:
    """Turns exchanges into token ids exactly as `conversation.encode_sample` does."""

    tokenizer: Any
    quote_ids: frozenset[int]

    @classmethod
    def of(cls, folder: Path | None = None) -> "Encoder":
        """Load the shipped tokenizer."""
        tokenizer = load(folder) if folder else load()
        quotes = frozenset(index for token, index in tokenizer.get_vocab().items() if '"' in token)
        return cls(tokenizer, quotes)

    def prefix(self) -> list[int]:
        """Return the ids before the image: <s> USER: and a space."""
        ids: list[int] = self.tokenizer.encode("USER: <image>").ids
        return ids[: ids.index(IMAGE_ID)]

    def question(self, text: str) -> list[int]:
        """Return the ids from after the image to ASSISTANT:."""
        ids: list[int] = self.tokenizer.encode(f"\n{text} ASSISTANT:", add_special_tokens=False).ids
        return ids

    def answer(self, text: str) -> list[int]:
        """Return an answer's ids with </s>."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]

    def pack(
        self, pairs: list[Exchange]
    ) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
        """Lay exchanges behind one another; return ids, loss weights and segment numbers.

        A weight stands at the token that is predicted. Exchanges that do not fit are left out.
        """
        ids = np.full(TAIL, EOS_ID, dtype=np.int16)
        weights = np.zeros(TAIL, dtype=np.uint8)
        segments = np.zeros(TAIL, dtype=np.uint8)
        end = 0
        for question, answer in pairs:
            asked, told = self.question(question), self.answer(answer)
            length = len(asked) + len(told)
            if end + length > TAIL:
                continue
            ids[end : end + length] = asked + told
            weights[end + len(asked) : end + length] = self._weights(told)
            segments[end : end + length] = segments.max() + 1
            end += length
        return ids, weights, segments

    def _weights(self, told: list[int]) -> list[int]:
        inside = False
        weights = []
        for token in told:
            weights.append(QUOTED_WEIGHT if inside else 1)
            if token in self.quote_ids:
                inside = not inside
        return weights


def level_at(progress: float, rng: random.Random) -> Level:
    """Return how hard a scene is at a share of the run: single large words come first."""
    ramp = min(1.0, max(0.0, (progress - 0.04) / 0.3))
    ease = rng.uniform(0.3, 1) * ramp
    return Level(clutter=ease, tilt=max(0.2, ramp) * rng.random(), nonsense=0.4 - 0.25 * ramp)


class ExampleMaker:
    """Renders examples as fast as it can; backgrounds are drawn once and shown many times."""

    BACKGROUNDS = 160

    def __init__(self, assets: Assets, encoder: Encoder, seed: int) -> None:
        self.assets = assets
        self.encoder = encoder
        self.rng = random.Random(seed)
        self._backgrounds: dict[tuple[str, int], Image.Image] = {}

    def make(self, progress: float) -> dict[str, NDArray[Any]]:
        """Return one example's arrays, by the names and shapes of FIELDS."""
        rng = self.rng
        scene = self._scene(level_at(progress, rng))
        picture, glyphs = draw(scene, self._background)
        image, offset = _square(picture)
        ids, weights, segments = self.encoder.pack(self._exchanges(scene, progress))
        return {
            "image": np.asarray(image),
            "ids": ids,
            "weights": weights,
            "segments": segments,
            "glyphs": _glyph_rows(scene, glyphs, offset),
        }

    def _scene(self, level: Level) -> Scene:
        rng = self.rng
        shorter = IMAGE_SIZE if rng.random() < 0.4 else int(IMAGE_SIZE * rng.uniform(0.75, 1))
        width, height = (IMAGE_SIZE, shorter) if rng.random() < 0.5 else (shorter, IMAGE_SIZE)
        words, faces = self.assets.words, self.assets.faces
        return compose(rng, words, faces, width=width, height=height, level=level)

    def _background(self, scene: Scene) -> Image.Image:
        key = (scene.background, scene.background_seed % (self.BACKGROUNDS // 8))
        if key not in self._backgrounds or self.rng.random() < 0.01:
            full = Scene(IMAGE_SIZE, IMAGE_SIZE, scene.background, scene.background_seed, (), None)
            self._backgrounds[key] = draw_background(full)
        left, top = IMAGE_SIZE - scene.width, IMAGE_SIZE - scene.height
        return self._backgrounds[key].crop((left, top, IMAGE_SIZE, IMAGE_SIZE))

    def _exchanges(self, scene: Scene, progress: float) -> list[Exchange]:
        """Put a full transcription first, so that every picture is read whole at least once."""
        pairs = exchanges(scene, self.rng)
        text = scene.signs[-1].text
        transcribing = progress < STAGE_1_SHARE or self.rng.random() < 0.35
        pairs.sort(key=lambda pair: not (text in pair[1] and transcribing == (pair[1][0] == '"')))
        unique: dict[str, str] = {}
        for question, answer in pairs:
            unique.setdefault(question, answer)
        return list(unique.items())


def _square(picture: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
    """Pad to the model's square as `images.square_pixels` does."""
    if picture.size == (IMAGE_SIZE, IMAGE_SIZE):
        return picture, (0, 0)
    left, top = (IMAGE_SIZE - picture.width) // 2, (IMAGE_SIZE - picture.height) // 2
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), PAD_COLOUR)
    canvas.paste(picture, (left, top))
    return canvas, (left, top)


def _glyph_rows(scene: Scene, glyphs: list[Glyph], offset: tuple[int, int]) -> NDArray[np.uint8]:
    rows = np.zeros((GLYPHS, 7), dtype=np.uint8)
    for row, glyph in zip(rows, glyphs, strict=False):
        sign = scene.signs[glyph.sign]
        row[:] = (
            min(IMAGE_SIZE - 1, max(0, round(glyph.x) + offset[0])),
            min(IMAGE_SIZE - 1, max(0, round(glyph.y) + offset[1])),
            ord(glyph.letter) - ord(" "),
            glyph.position,
            glyph.sign,
            COLOUR_IDS[sign.text_colour],
            COLOUR_IDS[sign.colour],
        )
    return rows
