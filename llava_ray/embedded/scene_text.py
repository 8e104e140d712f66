"""A generated scene-text data set in the TextOCR-GPT4V schema, the same one for the same seed.

Words and font families are those that pretraining never saw, so that scores on it are honest.
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_ray.embedded.captions import condensed
from llava_ray.embedded.draw import degrade, draw
from llava_ray.embedded.fonts import Face, find_faces
from llava_ray.embedded.scene import Level, Scene, compose
from llava_ray.embedded.words import Split, WordList, find_words
from llava_ray.errors import ConfigError

CAPTIONS = "captions.jsonl"
IMAGES = "images"
WORDS = "words.txt"
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Assets:
    """What scenes of one split are made from."""

    words: WordList
    faces: tuple[Face, ...]


def load_assets(split: Split, folder: Path | None = None) -> Assets:
    """Find words and fonts in installed packages, or in a folder that `pack_assets` wrote.

    Raises ConfigError naming what to install.
    """
    if folder is None:
        words, faces = find_words(), find_faces()
    elif (folder / WORDS).is_file():
        words = (folder / WORDS).read_text(encoding="utf-8").split()
        faces = [Face(path) for path in sorted(folder.glob("*.[ot]tf"))]
    else:
        raise ConfigError(
            f"no {WORDS} in {folder}: run 'llava-ray pretrain pack assets={folder}' first"
        )
    return Assets(
        WordList(words, split),
        tuple(face for face in faces if face.held_out == (split == "held_out")),
    )


def pack_assets(folder: Path) -> Path:
    """Copy words and fonts, for machines without the packages."""
    folder.mkdir(parents=True, exist_ok=True)
    for face in find_faces():
        shutil.copyfile(face.path, folder / face.path.name)
    (folder / WORDS).write_text("\n".join(find_words()), encoding="utf-8")
    return folder


def dataset_scene(assets: Assets, seed: int, index: int) -> tuple[Scene, random.Random]:
    """Compose one scene of a data set, and the rng that its caption and noise go on from."""
    rng = random.Random(f"{seed}/{index}")
    longer = rng.randint(224, 320)
    shorter = int(longer * rng.uniform(0.75, 1))
    size = rng.choice(((longer, shorter), (shorter, longer)))
    return compose(rng, assets.words, assets.faces, size, Level(clutter=0.6)), rng


def dataset_picture(
    assets: Assets, seed: int, index: int
) -> tuple[Image.Image, Scene, random.Random]:
    """Draw one scene of a data set as a camera sees it; its caption goes on from the rng."""
    scene, rng = dataset_scene(assets, seed, index)
    return degrade(draw(scene)[0], rng), scene, rng


def write_scene_text(folder: Path, count: int, seed: int) -> Path:
    """Render `count` scenes; return the jsonl of `filename`, `caption_condensed` and `words`.

    Images are JPEGs in folder/images; file names in the jsonl are relative to that folder.
    Raises ConfigError where word list or fonts are not installed.
    """
    assets = load_assets("held_out")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        image, scene, rng = dataset_picture(assets, seed, index)
        name = f"scene_{index:05d}.jpg"
        image.save(folder / IMAGES / name, quality=JPEG_QUALITY)
        caption = condensed(scene, rng)
        rows.append({"filename": name, "caption_condensed": caption, "words": scene.words})
    path = folder / CAPTIONS
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
