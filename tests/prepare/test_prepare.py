import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_data import stored_pictures, stored_samples

from llava_ray import prepare
from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import local_folder
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, DataError

Row = dict[str, Any]


def png(colour: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (colour % 256, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


def rows_of(folder: Path, count: int) -> list[Row]:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))
    return [{"filename": f"{i}.png", "caption_condensed": f"Sign {i}."} for i in range(count)]


def write_jsonl(path: Path, rows: list[Row | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_split(record: DatasetRecord, name: str) -> list[Any]:
    return list(json.loads((local_folder(record) / f"{name}.json").read_text("utf-8")))


def ids(record: DatasetRecord, name: str) -> set[str]:
    return {row["id"] for row in read_split(record, name)}


def test_jsonl_becomes_llava_json(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    rows = rows_of(tmp_path, 20)
    rows[3]["caption_condensed"] = '  A café sign: "Brötchen / 2 €".\n'
    record = prepare.run(config(write_jsonl(tmp_path / "c.jsonl", rows)))

    assert record.num_train + record.num_test == 20
    assert record.num_test >= 1
    assert record.rejected == {}
    everything = read_split(record, "train") + read_split(record, "test")
    row = next(row for row in everything if row["id"] == "3.png")
    assert row == {
        "id": "3.png",
        "image": "3.png",
        "conversations": [
            {"from": "human", "value": "<image>\nDescribe this image in detail."},
            {"from": "gpt", "value": 'A café sign: "Brötchen / 2 €".'},
        ],
    }
    folder = local_folder(record)
    assert stored_pictures(record)["3.png"] == png(3)
    sample = stored_samples(record, "train")[0]
    assert sample.turns[0].text == "Describe this image in detail."
    assert (folder / "rejected.jsonl").read_text() == ""


def test_every_bad_row_is_counted_and_listed(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows: list[Row | str] = [*rows_of(tmp_path, 10)]
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(png(1))
    (tmp_path / "broken.png").write_bytes(png(1, 64)[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    good = "A sign."
    rows += [
        {"filename": "gone.png", "caption_condensed": good},
        {"filename": "folder.png", "caption_condensed": good},
        {"filename": "broken.png", "caption_condensed": good},
        {"filename": "text.png", "caption_condensed": good},
        {"filename": "0.png", "caption_condensed": "\ud83d half of a letter"},
        {"filename": "./1.png", "caption_condensed": "  "},
        {"filename": "x2.png", "caption_condensed": None},
        {"filename": "x3.png", "caption_condensed": [[7]]},
        {"filename": "x4.png", "caption_condensed": "says <image> here"},
        {"filename": f"../{outside.name}", "caption_condensed": good},
        {"filename": str(outside), "caption_condensed": good},
        {"filename": "C:\\x.png", "caption_condensed": good},
        {"filename": "..\\x.png", "caption_condensed": good},
        {"filename": "", "caption_condensed": good},
        {"caption_condensed": good},
        '{"filename": "cut',
        "[1, 2]",
    ]
    source = write_jsonl(tmp_path / "c.jsonl", rows)

    record = prepare.run(config(source, max_rejected_share=0.8))

    assert record.rejected == {
        "broken_text": 1,
        "empty_caption": 3,
        "image_token_in_caption": 1,
        "missing_file": 2,
        "no_image": 2,
        "path_outside_folder": 4,
        "unreadable_row": 2,
        "unusable_image": 2,
    }
    assert record.num_train + record.num_test == 10
    folder = local_folder(record)
    listed = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in listed] == list(range(11, 28))
    assert listed[0] == {
        "row": 11, "id": "gone.png", "reason": "missing_file",
        "detail": f"gone.png is not in {tmp_path}: set data.images",
    }  # fmt: skip
    assert stored_pictures(record).keys() == {f"{i}.png" for i in range(10)}

    with pytest.raises(DataError, match=r"17 of 27 rows rejected \(.*4 path_outside_folder"):
        prepare.run(config(source))
    with pytest.raises(DataError, match=r"17 of 27 rows rejected \(4 path_outside_folder"):
        prepare.run(config(source, seed=1))
    assert not list((tmp_path / "runs" / ".staging").iterdir())


def test_same_source_is_found_and_changed_files_are_not(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows = rows_of(tmp_path, 4)
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    first = prepare.run(config(source))
    assert prepare.run(config(source)) == first

    (tmp_path / "2.png").write_bytes(png(77))
    changed_image = prepare.run(config(source))
    rows[0]["caption_condensed"] = "Another."
    write_jsonl(source, rows)
    changed_caption = prepare.run(config(source))
    assert len({first.id, changed_image.id, changed_caption.id}) == 3


def test_most_rows_keep_their_side_of_the_split_when_rows_are_added(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows = rows_of(tmp_path, 120)
    few = prepare.run(config(write_jsonl(tmp_path / "few.jsonl", rows[:60]), test_share=0.25))
    many = prepare.run(config(write_jsonl(tmp_path / "many.jsonl", rows[::-1]), test_share=0.25))
    assert (few.num_test, many.num_test) == (15, 30)
    assert len(ids(few, "test") & ids(many, "test")) >= 11

    other = prepare.run(config(tmp_path / "many.jsonl", test_share=0.25, seed=1))
    assert ids(other, "test") != ids(many, "test")


@pytest.mark.parametrize("test_share", [0.0, 1.0])
def test_both_sides_of_the_split_have_a_row(
    tmp_path: Path, config: Callable[..., RunConfig], test_share: float
) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", rows_of(tmp_path, 3))
    record = prepare.run(config(source, test_share=test_share))
    assert sorted([record.num_train, record.num_test]) == [1, 2]


def test_one_usable_row_is_too_few(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", rows_of(tmp_path, 1))
    with pytest.raises(DataError, match="1 usable rows of 1, at least 2 are needed"):
        prepare.run(config(source))
    with pytest.raises(DataError, match="has no rows"):
        prepare.run(config(write_jsonl(tmp_path / "none.jsonl", [])))


def test_limit_takes_the_first_rows(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", rows_of(tmp_path, 9))
    record = prepare.run(config(source, limit=4))
    assert ids(record, "train") | ids(record, "test") == {f"{i}.png" for i in range(4)}
    assert len(stored_pictures(record)) == 4


def test_larger_images_than_allowed_are_rejected(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows = rows_of(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(png(1, size=20))
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    record = prepare.run(config(source, max_image_pixels=399, max_rejected_share=0.5))
    assert record.rejected == {"unusable_image": 1}


def test_missing_columns_are_named_with_those_that_are_there(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [{"file": "a.png", "text": "b"}])
    with pytest.raises(
        DataError, match="none that is known as image; it has file, text: set data.image"
    ):
        prepare.run(config(source))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere/captions.jsonl", DataError, "no such file"),
        ("memory://bucket/captions.jsonl", DataError, "no such file"),
        ("nope://bucket/captions.jsonl", ConfigError, "unknown scheme"),
        ("/nowhere/at/all", DataError, "no such file"),
        ("some/dataset-id", DataError, "neither a file nor a hub id"),
    ],
)
def test_a_missing_source_is_one_line(
    config: Callable[..., RunConfig], source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        prepare.run(config(source))
    assert source in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_files_and_folders_are_refused(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "c.xml").write_text("filename,caption_condensed\n")
    with pytest.raises(ConfigError, match=r"only \.csv, .*\.parquet, \.tar files"):
        prepare.run(config(tmp_path / "c.xml"))
    with pytest.raises(ConfigError, match=r"no \.csv, .* in it, no save_to_disk and no pictures"):
        prepare.run(config(tmp_path))
    write_jsonl(tmp_path / "c.jsonl", [])
    (tmp_path / "d.csv").write_text("")
    with pytest.raises(ConfigError, match=r"several kinds of data: name one of c.jsonl, d.csv"):
        prepare.run(config(tmp_path))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not parquet"):
        prepare.run(config(tmp_path / "c.parquet"))
    with pytest.raises(ConfigError, match="no such folder"):
        prepare.run(config(tmp_path / "c.jsonl", images=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"data.question .*<image>"):
        prepare.run(config(tmp_path / "c.jsonl", question="<image> what?"))
