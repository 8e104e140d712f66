"""Forms that people's data have, each of which was refused, misread or told wrongly."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from test_odd_sources import rows_in, said, tar_of, write
from test_prepare import png, rows_of, write_jsonl

from llava_ray import prepare
from llava_ray.config.run import DataConfig, load_config
from llava_ray.errors import DataError
from llava_ray.models.rgb import open_image
from llava_ray.prepare.rows import Rejection, RowReader
from llava_ray.prepare.sources import open_table


def test_pictures_that_a_binary_column_only_names_are_part_of_the_id(tmp_path: Path) -> None:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = [f"{n}.png" for n in range(4)]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(png(n))
    cells = pyarrow.array([{"bytes": None, "path": name} for name in names], kind)
    table = pyarrow.table({"image": cells, "caption": ["A sign."] * 4})
    parquet.write_table(table, tmp_path / "rows.parquet")
    config = load_config(
        None, [f"data.source={tmp_path}/rows.parquet", f"storage.uri={tmp_path}/runs"]
    )
    first = prepare.run(config)
    assert prepare.run(config).id == first.id
    (tmp_path / "3.png").write_bytes(png(200))
    assert prepare.run(config).id != first.id


def test_quotes_that_stand_rightly_are_believed(tmp_path: Path) -> None:
    text = 'image,caption\n0.png,"Left; its twin:\n1.png, a dog"\n2.png,Two\n'
    found = said(write(tmp_path / "rows.csv", text))
    assert found == {"0.png": "Left; its twin:\n1.png, a dog", "2.png": "Two"}


def test_labels_have_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": ["0.png", "1.png"], "label": [1, 0]}, features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in ("saved", "rows.parquet"):
        found = said(tmp_path / source, caption_column="label")
        assert found == {"0.png": "dog", "1.png": "cat"}


def test_what_img2dataset_and_the_hub_write_beside_is_no_data(tmp_path: Path) -> None:
    images = tmp_path / "images" / "00000"
    for name in ("000", "001"):
        write(images / f"{name}.jpg", b"x")
        write(images / f"{name}.txt", f"Sign {name}")
        write(images / f"{name}.json", "{}")
    write(tmp_path / "images" / "00000.parquet", b"x")
    write(tmp_path / "images" / "00000_stats.json", "{}")
    assert list(said(tmp_path / "images").values()) == ["Sign 000", "Sign 001"]
    write(tmp_path / "hub" / "rows.csv", "image,caption\n0.png,One\n")
    write(tmp_path / "hub" / "dataset_infos.json", "{}")
    assert said(tmp_path / "hub") == {"0.png": "One"}


def test_a_caption_stands_in_for_a_missing_conversation(tmp_path: Path) -> None:
    rows = [
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                             {"from": "gpt", "value": "A sign."}]},
        {"image": "1.png", "caption": "A dog."},
    ]  # fmt: skip
    found = said(write(tmp_path / "rows.json", json.dumps(rows)))
    assert found == {"0.png": "A sign.", "1.png": "A dog."}


def test_files_of_a_sample_apart_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    tar_of(path, [("0.png", png(0)), ("1.png", png(1)), ("0.txt", "zero"), ("1.txt", "one")])
    with pytest.raises(DataError, match=r"0.txt comes after other samples .* \(tar --sort=name\)"):
        rows_in(path)


def test_a_file_that_is_not_utf_8_says_so(tmp_path: Path) -> None:
    text = "image,caption\n0.png,Ein schönes Bild\n".encode("cp1252")
    (row,) = rows_in(write(tmp_path / "rows.csv", text))
    assert isinstance(row, Rejection)
    assert row.detail.endswith("the file is not UTF-8: save it so (Excel: CSV UTF-8)")
    line = '{"image": "0.png", "caption": "schön"}\n'.encode("cp1252")
    with pytest.raises(DataError, match=r"its first is not JSON \('utf-8' codec"):
        rows_in(write(tmp_path / "rows.jsonl", line))


ROWS = [{"image": "0.png", "caption": "One"}, {"image": "1.png", "caption": "Two"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.jsonl", json.dumps(ROWS)),
        ("pretty.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("rows.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("coco.json", json.dumps({
            "info": {},
            "images": [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}],
            "annotations": [{"id": 1, "image_id": 7, "caption": "One"},
                            {"id": 2, "image_id": 8, "caption": "Two"}],
        })),
    ],
)  # fmt: skip
def test_json_of_every_shape(tmp_path: Path, name: str, text: str) -> None:
    assert said(write(tmp_path / name, text)) == {"0.png": "One", "1.png": "Two"}


def test_an_object_that_is_no_list_is_named_by_its_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps({"train": [], "val": [], "n": 1}))
    with pytest.raises(DataError, match="a dict with the keys train, val, n, not a list of rows"):
        rows_in(path)


def test_what_a_cell_holds_is_said(tmp_path: Path) -> None:
    row = {"image": "0.png", "answers": [{"answer": "two"}]}
    (found,) = rows_in(write(tmp_path / "rows.jsonl", json.dumps(row)), caption_column="answers")
    assert isinstance(found, Rejection) and found.detail == "a dict, not text"


def test_an_instructions_input_belongs_to_it(tmp_path: Path) -> None:
    row = {"image": "0.png", "instruction": "Translate.", "input": "OPEN", "output": "Offen"}
    (found,) = rows_in(write(tmp_path / "rows.jsonl", json.dumps(row)))
    assert not isinstance(found, Rejection)
    assert found.sample.turns[0].text == "Translate.\nOPEN"


def test_a_picture_without_its_text_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jpg", b"x")
    write(tmp_path / "a.txt", "A sign")
    config = DataConfig(source=str(tmp_path))
    good, bad = RowReader(open_table(config), config)
    assert isinstance(bad, Rejection) and bad.detail == "b.jpg has no .txt of the same name"


def test_rejected_rows_of_a_mix_name_their_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = rows_of(tmp_path / name, 6)
        if name == "b":
            rows.append({"filename": "none.png", "caption_condensed": "x"})
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
    source = tmp_path / "b" / "rows.jsonl"
    parts = ", ".join(f"{{source: {tmp_path}/{name}/rows.jsonl}}" for name in ("a", "b"))
    config = load_config(
        None,
        [f"data.mix=[{parts}]", f"storage.uri={tmp_path}/runs", "data.max_rejected_share=0.9"],
    )
    record = prepare.run(config)
    lines = (Path(record.uri) / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [str(source)]


def test_greys_without_a_number_keep_the_others_range(tmp_path: Path) -> None:
    values = np.linspace(1000, 1100, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tiff")
    found = np.asarray(open_image(tmp_path / "x.tiff", max_pixels=100))[..., 0]
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    assert found[0, 1] <= 5


def test_a_picture_as_large_as_is_allowed_is_read(tmp_path: Path) -> None:
    Image.new("1", (15000, 13000)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", max_pixels=200_000_000).size == (15000, 13000)
