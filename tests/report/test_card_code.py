"""A model card's code, taken out of the card and run on a picture that is no square (E3, E5)."""

import re
import shutil
from pathlib import Path

import pytest
from measured_run import make_scorecards
from PIL import Image, ImageDraw

from llava_ray.artifacts.records import DatasetRecord, Scorecard, Variant
from llava_ray.artifacts.store import read_record
from llava_ray.merge.beside import carry
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration
from llava_ray.report.findings import Origins
from llava_ray.report.pages import write_card


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    def card_of(scorecard: Scorecard) -> str:
        origins = Origins(read_record(DatasetRecord, scorecard.dataset_uri), {}, {}, None, None)
        return write_card(scorecard, read_record(Variant, scorecard.variant_uri), origins)

    found = make_scorecards(tmp_path_factory.mktemp("measured"))
    return {scorecard.slug: card_of(scorecard) for scorecard in found}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(EMBEDDED / name, folder)
    carry(EMBEDDED, folder)
    return folder


def answers(card: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    image = Image.new("RGB", (600, 240), (236, 226, 200))
    ImageDraw.Draw(image).text((60, 70), "OPEN LATE", fill=(20, 20, 40), font_size=90)
    image.save(folder / "photo.jpg", quality=95)
    found = []
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        if "from vllm" in code:
            continue
        capsys.readouterr()
        exec(code, {})
        found.append(capsys.readouterr().out.strip())
    return found


@pytest.mark.parametrize(
    ("slug", "readers"), [("none-fp16", 2), ("bnb-nf4", 2), ("hqq-w4-g64", 1), ("gguf-q8_0", 1)]
)
def test_a_cards_code_gives_the_engines_answer(
    slug: str, readers: int, cards: dict[str, str], merged: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spec_for(slug).quantize(merged, tmp_path, Calibration("", 0), "cpu")
    monkeypatch.chdir(tmp_path)
    found = answers(cards[slug], tmp_path, capsys)
    assert len(found) == readers and len(set(found)) == 1
    assert "open" in found[0].lower()


def test_transformers_refuses_what_it_would_misread(merged: Path, tmp_path: Path) -> None:
    """E3"""
    from transformers import AutoModelForImageTextToText

    spec_for("hqq-w4-g64").quantize(merged, tmp_path, Calibration("", 0), "cpu")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
