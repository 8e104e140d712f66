"""From a scene to the fixed-size arrays that pretraining moves to the GPU."""

import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from llava_ray.embedded.captions import Exchange, exchanges
from llava_ray.embedded.draw import Glyph, draw, draw_background
from llava_ray.embedded.scene import COLOURS, Level, Scene, compose
from llava_ray.embedded.scene_text import Assets
from llava_ray.embedded.vocabulary import EOS_ID, IMAGE_ID, load
from llava_ray.models.images import square_pixels

IMAGE_SIZE = 224
TAIL = 185
"""Tokens after the image: as many exchanges as fit. With 3 + 196 before them, 384 in all."""
GLYPHS = 96
QUOTED_WEIGHT = 3
"""Of a token inside quotes, against 1: words matter more than the phrases around them."""
STAGE_1_SHARE = 0.35
"""Of the whole run; LLaVA's first stage, here transcription of ever harder scenes."""

LETTERS = 95
"""No glyph, or one of the 94 printable ASCII characters."""
LETTERS_PER_PATCH = 3
POSITIONS = 48
SIGNS = 6
COLOUR_IDS = {name: index for index, name in enumerate(COLOURS)}
PROBE_CLASSES = (*[LETTERS] * LETTERS_PER_PATCH, POSITIONS, SIGNS, len(COLOURS), len(COLOURS))
"""How many classes each of the probe's answers about a patch has."""

Example = dict[str, NDArray[Any]]
"""uint8 `image` [224, 224, 3]; `ids`, loss `weights`, `segments` and `positions` [TAIL] as
`Encoder.pack` lays them out; uint8 `glyphs` [GLYPHS, 7] with the columns x, y, letter (0 for
none), position, sign, text colour, sign colour."""


class Encoder:
    """Turns exchanges into token ids exactly as `conversation.encode_sample` does."""

    def __init__(self) -> None:
        self.tokenizer = load()
        self.quote_ids = [i for token, i in self.tokenizer.get_vocab().items() if '"' in token]

    def prefix(self) -> list[int]:
        """Return the ids before the image: <s> USER: and a space."""
        ids = list(self.tokenizer.encode("USER: <image>").ids)
        return ids[: ids.index(IMAGE_ID)]

    def question(self, text: str) -> list[int]:
        """Return the ids from after the image to ASSISTANT:."""
        return list(self.tokenizer.encode(f"\n{text} ASSISTANT:", add_special_tokens=False).ids)

    def answer(self, text: str) -> list[int]:
        """Return an answer's ids with </s>."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]

    def pack(self, pairs: list[Exchange]) -> Example:
        """Lay exchanges behind one another: ids, loss weights, segment numbers and positions.

        A weight stands at the token that is predicted; segments count from 1, 0 is padding;
        positions count from the image. Exchanges that do not fit are left out.
        """
        ids = np.full(TAIL, EOS_ID, dtype=np.int16)
        weights, segments, positions = np.zeros((3, TAIL), dtype=np.uint8)
        end = 0
        for question, answer in pairs:
            asked, answered = self.question(question), self.answer(answer)
            length = len(asked) + len(answered)
            if end + length > TAIL:
                continue
            ids[end : end + length] = asked + answered
            marks = np.isin(answered, self.quote_ids)
            # A quote is open where an odd number of marks stands before a token.
            inside = (marks.cumsum() - marks) % 2 == 1
            weights[end + len(asked) : end + length] = np.where(inside, QUOTED_WEIGHT, 1)
            segments[end : end + length] = segments.max() + 1
            positions[end : end + length] = np.arange(length)
            end += length
        return {"ids": ids, "weights": weights, "segments": segments, "positions": positions}


class Examples(IterableDataset[Example]):
    """Renders examples without end; backgrounds are drawn once and shown many times."""

    BACKGROUNDS = 160

    def __init__(self, assets: Assets, encoder: Encoder) -> None:
        self.assets = assets
        self.encoder = encoder
        # A DataLoader's workers have seeds of their own.
        self.rng = random.Random(0)
        # How far the run is, which sets how hard scenes are. Shared with the worker processes.
        self.progress = multiprocessing.Value("d", 0.0)
        self._backgrounds: dict[tuple[str, int], Image.Image] = {}

    def __iter__(self) -> Iterator[Example]:
        if worker := get_worker_info():
            self.rng = random.Random(worker.seed)
        while True:
            yield self.make(self.progress.value)

    def make(self, progress: float) -> Example:
        """Render one example at a share of the run: single large words come first."""
        rng = self.rng
        ramp = min(1.0, max(0.0, (progress - 0.04) / 0.3))
        ease = rng.uniform(0.3, 1) * ramp
        level = Level(clutter=ease, tilt=max(0.2, ramp) * rng.random(), nonsense=0.4 - 0.25 * ramp)
        shorter = IMAGE_SIZE if rng.random() < 0.4 else int(IMAGE_SIZE * rng.uniform(0.75, 1))
        size = (IMAGE_SIZE, shorter) if rng.random() < 0.5 else (shorter, IMAGE_SIZE)
        scene = compose(rng, self.assets.words, self.assets.faces, size, level)
        picture, glyphs = draw(scene, self._background)
        offset = ((IMAGE_SIZE - scene.width) // 2, (IMAGE_SIZE - scene.height) // 2)
        return {
            "image": square_pixels(picture, IMAGE_SIZE).copy(),
            **self.encoder.pack(self._exchanges(scene, progress)),
            "glyphs": _glyph_rows(scene, glyphs, offset),
        }

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
        return list(dict.fromkeys(pairs))


def _glyph_rows(scene: Scene, glyphs: list[Glyph], offset: tuple[int, int]) -> NDArray[np.uint8]:
    rows = np.zeros((GLYPHS, 7), dtype=np.uint8)
    for row, glyph in zip(rows, glyphs, strict=False):
        sign = scene.signs[glyph.sign]
        row[:] = (
            min(IMAGE_SIZE - 1, max(0, round(glyph.x) + offset[0])),
            min(IMAGE_SIZE - 1, max(0, round(glyph.y) + offset[1])),
            ord(glyph.letter) - ord(" "),
            min(POSITIONS - 1, glyph.position),
            min(SIGNS - 1, glyph.sign),
            COLOUR_IDS[sign.text_colour],
            COLOUR_IDS[sign.colour],
        )
    return rows
