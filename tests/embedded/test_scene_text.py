import json
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_ray.embedded import captions
from llava_ray.embedded.draw import draw
from llava_ray.embedded.fonts import HELD_OUT_FAMILIES
from llava_ray.embedded.scene_text import (
    Assets,
    dataset_picture,
    dataset_scene,
    load_assets,
    pack_assets,
    write_scene_text,
)
from llava_ray.embedded.words import find_words, is_held_out
from llava_ray.errors import ConfigError


@pytest.fixture(scope="module")
def held_out() -> Assets:
    return load_assets("held_out")


@pytest.fixture(scope="module")
def training() -> Assets:
    return load_assets("train")


def test_same_seed_writes_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        write_scene_text(tmp_path / name, count=4, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    for path in sorted((tmp_path / "a/images").iterdir()):
        assert path.read_bytes() == (tmp_path / "b/images" / path.name).read_bytes()


def test_rows_name_images_and_quote_every_word(tmp_path: Path) -> None:
    path = write_scene_text(tmp_path, count=12, seed=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        with Image.open(path.parent / "images" / row["filename"]) as image:
            assert 224 <= max(image.size) <= 320
        quoted = " ".join(row["caption_condensed"].split('"')[1::2]).split()
        assert sorted(quoted) == sorted(row["words"]) != []


def test_splits_share_neither_word_nor_font(training: Assets, held_out: Assets) -> None:
    words = [{w for group in a.words.by_length for w in group} for a in (training, held_out)]
    assert not words[0] & words[1]
    assert len(words[1]) > 10_000
    assert words[0] | words[1] == set(find_words())
    families = [{face.family for face in a.faces} for a in (training, held_out)]
    assert not families[0] & families[1]
    assert families[1] == set(HELD_OUT_FAMILIES)


def test_training_scenes_show_no_held_out_word(training: Assets) -> None:
    known = set(find_words())
    for index in range(150):
        scene, _ = dataset_scene(training, 9, index)
        for word in scene.words:
            letters = word.strip("!?&").lower()
            assert letters not in known or not is_held_out(letters), word
        assert all(not sign.face.held_out for sign in scene.signs)


def test_random_letters_avoid_words_of_the_other_split(training: Assets) -> None:
    rng = random.Random(0)
    drawn = {training.words.letters(rng, 3) for _ in range(3000)}
    assert not drawn & training.words.forbidden


def test_glyphs_lie_in_the_picture_in_the_order_of_the_text(held_out: Assets) -> None:
    for index in range(30):
        scene, _ = dataset_scene(held_out, 4, index)
        image, glyphs = draw(scene)
        for number, sign in enumerate(scene.signs):
            mine = [glyph for glyph in glyphs if glyph.sign == number]
            assert "".join(glyph.letter for glyph in mine) == sign.text.replace(" ", "")
            assert all(sign.text[glyph.position] == glyph.letter for glyph in mine)
            for glyph in mine:
                assert -2 <= glyph.x <= image.width + 2
                assert -2 <= glyph.y <= image.height + 2


def test_captions_name_colours_places_and_things(held_out: Assets) -> None:
    for index in range(20):
        scene, rng = dataset_scene(held_out, 5, index)
        told = captions.condensed(scene, rng)
        assert scene.background in told
        for sign in scene.signs:
            assert f"{sign.colour} {sign.kind}" in told
            assert f"in {sign.text_colour}" in told
        if scene.thing:
            assert f"{scene.thing.colour} {scene.thing.kind} is visible" in told
        for question, answer in captions.exchanges(scene, rng):
            assert question.endswith((".", "?"))
            assert answer != told


def test_packed_assets_give_the_same_scenes(tmp_path: Path, held_out: Assets) -> None:
    pack_assets(tmp_path / "assets")
    packed = load_assets("held_out", tmp_path / "assets")
    for index in range(2):
        image, scene, _ = dataset_picture(packed, 1, index)
        installed_image, installed_scene, _ = dataset_picture(held_out, 1, index)
        assert (image, scene.words) == (installed_image, installed_scene.words)


@pytest.mark.parametrize("package", ["english_words", "font_roboto"])
def test_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_ray\[scene-text\]'"):
        load_assets("held_out")
