import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_prepare import png, read_split, rows_of

from llava_ray import prepare
from llava_ray.artifacts.store import local_folder
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.sources import open_hub


def captions(record: Any) -> dict[str, str]:
    everything = read_split(record, "train") + read_split(record, "test")
    return {row["image"]: row["conversations"][1]["value"] for row in everything}


def test_parquet_with_images_apart(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    images = tmp_path / "train_images"
    images.mkdir()
    rows = rows_of(images, 5)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    record = prepare.run(config(tmp_path / "c.parquet", images=str(images)))
    assert captions(record) == {f"{i}.png": f"Sign {i}." for i in range(5)}


@pytest.mark.parametrize("column", ["image", "images", "photo"])
def test_parquet_with_an_image_column(
    tmp_path: Path, config: Callable[..., RunConfig], column: str
) -> None:
    rows = [
        {column: {"bytes": png(i), "path": f"{i}.png"}, "caption_condensed": f"Sign {i}."}
        for i in range(5)
    ]
    if column == "images":
        rows = [{**row, column: [row[column]]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    record = prepare.run(config(tmp_path / "c.parquet"))
    assert sorted(captions(record).values()) == [f"Sign {i}." for i in range(5)]
    stored = {p.read_bytes() for p in (local_folder(record) / "images").iterdir()}
    assert stored == {png(i) for i in range(5)}


def test_a_path_inside_an_image_column_cannot_leave_the_folder(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png(i), "path": None}, "caption_condensed": "A."} for i in range(3)
    ]
    rows.append({"image": {"bytes": None, "path": str(secret)}, "caption_condensed": "B."})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    record = prepare.run(config(tmp_path / "c.parquet", max_rejected_share=0.5))
    assert record.rejected == {"path_outside_folder": 1}


def llava_row(name: str, *turns: tuple[str, str]) -> dict[str, Any]:
    said = [{"from": who, "value": value} for who, value in turns]
    return {"id": name, "image": f"{name}.png", "conversations": said}


def test_llava_json_keeps_the_first_exchange_and_counts_the_rest(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows_of(tmp_path, 4)
    rows = [
        llava_row("0", ("human", "<image>\nWhat is it?"), ("gpt", "A sign.")),
        llava_row(
            "1",
            ("human", "What does it say?\n<image>"), ("gpt", '"Exit".'),
            ("human", "And?"), ("gpt", "No more."),
            ("human", "Sure?"), ("gpt", "Yes."),
        ),
        llava_row("2", ("human", "<image> <image> both?"), ("gpt", "No.")),
        llava_row("3", ("gpt", "Hello."), ("human", "Hm?")),
        {"id": "4", "image": "0.png", "conversations": []},
        {"id": "5", "conversations": rows_of(tmp_path, 1)},
        "text",
    ]  # fmt: skip
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    record = prepare.run(config(path, max_rejected_share=0.9))
    assert record.further_exchanges == 2
    assert record.rejected == {
        "no_exchange": 2,
        "no_image": 1,
        "several_images": 1,
        "unreadable_row": 1,
    }
    said = {
        row["id"]: [turn["value"] for turn in row["conversations"]]
        for row in read_split(record, "train") + read_split(record, "test")
    }
    assert said == {
        "0": ["<image>\nWhat is it?", "A sign."],
        "1": ["<image>\nWhat does it say?", '"Exit".'],
    }


def test_prepared_json_prepares_again_to_the_same_split(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows_of(tmp_path, 8)))
    first = prepare.run(config(source))
    folder = local_folder(first)
    again = prepare.run(config(folder / "train.json", images=str(folder / "images")))
    everything = captions(again)
    assert everything == {
        row["image"]: row["conversations"][1]["value"] for row in read_split(first, "train")
    }


@pytest.mark.parametrize("text", ["{}", "[1", '"x"'])
def test_json_that_is_not_llava_is_refused(
    tmp_path: Path, config: Callable[..., RunConfig], text: str
) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=r"c\.json"):
        prepare.run(config(tmp_path / "c.json"))


def test_a_hub_data_set_yields_bytes_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub" / "train"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"file_name": row["filename"], "caption_condensed": row["caption_condensed"]})
        for row in rows_of(folder, 3)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = open_hub(str(tmp_path / "hub"), "train")
    assert table.num_rows == 3
    assert table.binary_columns == {"image"}
    cells = list(table.read(["image", "caption_condensed"]))
    assert [cell["image"]["bytes"] for cell in cells] == [png(i) for i in range(3)]
    assert [cell["caption_condensed"] for cell in cells] == [f"Sign {i}." for i in range(3)]
    with pytest.raises(ConfigError, match="'test': .* has train"):
        open_hub(str(tmp_path / "hub"), "test")


def test_scene_text_is_drawn_once_for_its_count_and_seed(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare.run(config("scene-text", limit=6))
    assert first.num_train + first.num_test == 6
    assert first.rejected == {}

    def drawn_again(*args: Any, **kwargs: Any) -> Path:
        raise AssertionError("drawn although the artifact is there")

    monkeypatch.setattr("llava_ray.embedded.scene_text.write_scene_text", drawn_again)
    assert prepare.run(config("scene-text", limit=6)) == first
    with pytest.raises(AssertionError, match="drawn although"):
        prepare.run(config("scene-text", limit=6, seed=1))
