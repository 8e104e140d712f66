import json
from pathlib import Path

from PIL import Image
from small_data import stored_pictures

from llava_ray import prepare
from llava_ray.config.run import load_config

REAL = Path(__file__).parents[1] / "data" / "real"


def captions() -> dict[str, str]:
    lines = (REAL / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(set(row) == {"filename", "caption_condensed"} for row in rows)
    return {row["filename"]: row["caption_condensed"] for row in rows}


def test_twenty_or_more_photographs_are_small_and_all_captioned() -> None:
    files = {f"images/{path.name}" for path in (REAL / "images").iterdir()}
    assert set(captions()) == files
    assert len(files) >= 20
    assert sum((REAL / name).stat().st_size for name in files) <= 3_000_000
    for name in files:
        with Image.open(REAL / name) as image:
            assert image.format == "JPEG"
            assert 150 < max(image.size) <= 640


def test_captions_describe_and_most_quote_text() -> None:
    texts = list(captions().values())
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 25 for text in texts)
    quoting = [index for index, text in enumerate(texts) if text.count('"') >= 2]
    assert len(quoting) >= len(texts) / 2
    # Photographs with text come first.
    assert quoting == list(range(len(quoting)))


def test_every_photograph_has_its_package_licence_and_origin() -> None:
    lines = (REAL / "SOURCES.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    rows = [row for row in cells if row[0].startswith("images/")]
    assert {row[0] for row in rows} == set(captions())
    for _, package, original, licence, origin in rows:
        assert package.split()[1][0].isdigit(), "a package with its version"
        assert Path(original).suffix in (".png", ".jpg")
        known = ("Apache-2.0", "BSD-3-Clause", "MIT", "CC0", "CC BY 2.0", "Pexels", "public domain")
        assert licence.startswith((*known, "no known copyright restrictions"))
        assert origin


def test_prepare_accepts_all(tmp_path: Path) -> None:
    overrides = [f"storage.uri={tmp_path}", f"data.source={REAL / 'captions.jsonl'}"]
    record = prepare.run(load_config(None, overrides))
    assert record.rejected == {}
    assert record.num_train + record.num_test == len(captions())
    assert record.num_test >= 2
    assert len(stored_pictures(record)) == len(captions())
