import codecs
import functools
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from small_data import stored_pictures, stored_samples
from test_prepare import png, read_split, rows_of, write_jsonl

from llava_ray import prepare
from llava_ray.artifacts.store import local_folder
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.chat_template import Turn
from llava_ray.prepare.rows import RowReader
from llava_ray.prepare.sources import open_file, open_hub
from llava_ray.prepare.table import Table


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
    stored = set(stored_pictures(record).values())
    assert stored == {png(i) for i in range(5)}


def test_a_path_inside_an_image_column_cannot_leave_the_folder(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "data").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png(i), "path": None}, "caption_condensed": "A."} for i in range(3)
    ]
    rows.append({"image": {"bytes": None, "path": str(secret)}, "caption_condensed": "B."})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "c.parquet")
    record = prepare.run(config(tmp_path / "data" / "c.parquet", max_rejected_share=0.5))
    assert record.rejected == {"path_outside_folder": 1}


def llava_row(name: str, *turns: tuple[str, str]) -> dict[str, Any]:
    said = [{"from": who, "value": value} for who, value in turns]
    return {"id": name, "image": f"{name}.png", "conversations": said}


def test_llava_json_keeps_every_exchange(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    """C6, C9, C10"""
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
        {
            "id": "3", "image": ["2.png", "3.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image> or"}, {"from": "human", "value": "<image>?"},
                {"from": "gpt", "value": "Neither."},
            ],
        },
        {"id": "0", "conversations": [
            {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hm?"},
            {"from": "gpt", "value": "Yes?"}, {"from": "human", "value": "Nothing."},
        ]},
        llava_row("3", ("gpt", "Hello."), ("human", "Hm?")),
        {"id": "4", "image": "0.png", "conversations": []},
        {"id": "5", "conversations": rows_of(tmp_path, 1)},
        {"image": ["0.png", "1.png"], "conversations": [
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "One."},
        ]},
        "text",
    ]  # fmt: skip
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    record = prepare.run(config(path, max_rejected_share=0.9))
    assert record.rejected == {
        "image_count": 1,
        "no_exchange": 3,
        "no_image": 1,
        "unreadable_row": 1,
    }
    assert (record.num_exchanges, record.num_images) == (6, 4)
    said = [
        (row["id"], row.get("image"), [turn["value"] for turn in row["conversations"]])
        for row in read_split(record, "train") + read_split(record, "test")
    ]
    assert sorted(said, key=str) == [
        ("0", "0.png", ["<image>\nWhat is it?", "A sign."]),
        ("0", None, ["Hm?", "Yes?"]),
        (
            "1",
            "1.png",
            ["<image>\nWhat does it say?", '"Exit".', "And?", "No more.", "Sure?", "Yes."],
        ),
        ("3", ["2.png", "3.png"], ["Be brief.", "<image>\n<image>\nor\n?", "Neither."]),
    ]


OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "0.png"}}, {"type": "text", "text": "What?"},
    ]},
    {"role": "assistant", "content": "A sign."},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "No more."}]},
]  # fmt: skip
SHAREGPT = [
    {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A sign."},
    {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No more."},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": OPENAI}, "Be brief."),
        ({"conversations": SHAREGPT, "image": "0.png"}, None),
        ({"conversations": SHAREGPT, "images": ["0.png"]}, None),
        ({"conversations": json.dumps(SHAREGPT), "file_name": "0.png"}, None),
        (
            {
                "images": ["0.png"],
                "texts": [
                    {"user": "What?", "assistant": "A sign.", "source": "x"},
                    {"user": "And?", "assistant": "No more.", "source": "x"},
                ],
            },
            None,
        ),
    ],
)
def test_conversations_are_read_as_people_write_them(
    tmp_path: Path, config: Callable[..., RunConfig], row: dict[str, Any], system: str | None
) -> None:
    """G1"""
    rows_of(tmp_path, 2)
    other = json.loads(json.dumps(row).replace("0.png", "1.png"))
    write_jsonl(tmp_path / "c.jsonl", [row, other])
    record = prepare.run(config(tmp_path / "c.jsonl"))
    samples = stored_samples(record)
    assert {sample.images for sample in samples} == {("0.png",), ("1.png",)}
    for sample in samples:
        assert sample.turns == (Turn("What?", 1, "A sign."), Turn("And?", 0, "No more."))
        assert sample.system == system


def _csv(folder: Path, text: str) -> Path:
    (folder / "c.csv").write_text(text, encoding="utf-8")
    return folder / "c.csv"


def _tar(folder: Path, *, as_json: bool) -> Path:
    with tarfile.open(folder / "data-000.tar", "w") as tar:
        for i in range(4):
            caption: dict[str, Any] = {"id": f"n{i}", "caption": f"Sign {i}."}
            text = json.dumps(caption) if as_json else caption["caption"]
            parts = {"png": png(i), "json" if as_json else "txt": text.encode()}
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"a/{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder / "data-000.tar"


def _imagefolder(folder: Path, name: str) -> Path:
    inside = folder / "train"
    inside.mkdir()
    rows = rows_of(inside, 4)
    if name.endswith("csv"):
        lines = ["file_name,text", *(f"{i}.png,Sign {i}." for i in range(4))]
        (inside / name).write_text("\n".join(lines))
    else:
        named = [{"file_name": r["filename"], "text": r["caption_condensed"]} for r in rows]
        write_jsonl(inside / name, named)
    return folder


def _saved(folder: Path, *, as_dict: bool) -> Path:
    import datasets

    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"Sign {i}."} for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_list(rows, features=features)
    whole: Any = datasets.DatasetDict({"train": dataset}) if as_dict else dataset
    whole.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _captions(folder: Path) -> Path:
    rows_of(folder, 4)
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Sign {i}.\n", encoding="utf-8-sig")
    return folder


def _parquets(folder: Path) -> Path:
    inside = folder / "data"
    inside.mkdir()
    for i in range(4):
        rows = [{"image": {"bytes": png(i), "path": "x.png"}, "caption": f"Sign {i}."}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), inside / f"train-{i:05d}.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), inside / "test-00000.parquet")
    return folder


SHAPES: dict[str, Callable[[Path], Path]] = {
    "csv": lambda f: rows_of(f, 4) and _csv(f, "image,caption\n" + "".join(
        f'{i}.png,"Sign {i}."\n' for i in range(4))),
    "csv with semicolons and a mark": lambda f: rows_of(f, 4) and _csv(
        f, "\ufefffilename;text\n" + "".join(f"{i}.png;Sign {i}.\n" for i in range(4))),
    "tar of txt": lambda f: _tar(f, as_json=False),
    "tar of json": lambda f: _tar(f, as_json=True),
    "folder of tars": lambda f: _tar(f, as_json=True).parent,
    "imagefolder, jsonl": lambda f: _imagefolder(f, "metadata.jsonl"),
    "imagefolder, csv": lambda f: _imagefolder(f, "metadata.csv"),
    "save_to_disk": lambda f: _saved(f, as_dict=False),
    "save_to_disk of splits": lambda f: _saved(f, as_dict=True),
    "pictures with captions": _captions,
    "folder of parquet": _parquets,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_data_come_in_the_shapes_that_people_have(
    tmp_path: Path, config: Callable[..., RunConfig], shape: str
) -> None:
    """G1"""
    folder = tmp_path / "data"
    folder.mkdir()
    record = prepare.run(config(SHAPES[shape](folder)))
    assert record.rejected == {}
    assert sorted(captions(record).values()) == [f"Sign {i}." for i in range(4)]
    stored = set(stored_pictures(record).values())
    assert stored == {png(i) for i in range(4)}


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL, and the folder that it shows."""
    folder = tmp_path / "website"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_data_and_pictures_come_from_any_file_system(
    tmp_path: Path, config: Callable[..., RunConfig], website: tuple[str, Path]
) -> None:
    """C12"""
    memory, (url, folder) = fsspec.filesystem("memory"), website
    rows = [{"image": f"{i}.png", "caption": f"Sign {i}."} for i in range(4)]
    memory.pipe("/bucket/c.jsonl", "\n".join(map(json.dumps, rows)).encode())
    rows_of(folder, 4)
    source = "memory://bucket/c.jsonl"
    record = prepare.run(config(source, images=url))
    assert sorted(captions(record).values()) == [f"Sign {i}." for i in range(4)]
    assert prepare.run(config(source, images=url)) == record
    (folder / "2.png").write_bytes(png(9))
    assert prepare.run(config(source, images=url)) != record
    local = rows_of(tmp_path, 4)
    memory.pipe("/folder/train/metadata.jsonl", "\n".join(map(json.dumps, local)).encode())
    for i in range(4):
        memory.pipe(f"/folder/train/{i}.png", png(i))
    assert sorted(captions(prepare.run(config("memory://folder"))).values()) == [
        f"Sign {i}." for i in range(4)
    ]


def test_quotes_that_are_doubled_late_are_read(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows_of(tmp_path, 3)
    plain = "".join(f"0.png,plain {'x' * 300}\n" for _ in range(300))
    late = '1.png,"A sign, reading ""STOP"", and\na second ""line"""\n'
    path = _csv(tmp_path, "image,caption\n" + plain + late)
    said = [
        row.sample.turns[0].answer for row in RowReader(open_file(path), DataConfig(source="x"))
    ]
    assert said[-1] == 'A sign, reading "STOP", and\na second "line"'
    assert len(said) == 301


@pytest.mark.parametrize("damage", ["a header", "cut"])
def test_a_damaged_tar_is_no_shorter_tar(tmp_path: Path, damage: str) -> None:
    content = bytearray(_tar(tmp_path, as_json=True).read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2 // 512 * 512]
    else:
        content[4096] ^= 255
    (tmp_path / "data-000.tar").write_bytes(content)
    with pytest.raises(DataError, match="no whole tar"):
        open_file(tmp_path / "data-000.tar")


def test_pictures_beside_a_remote_table_and_files_by_uri(
    tmp_path: Path, config: Callable[..., RunConfig], website: tuple[str, Path]
) -> None:
    url, folder = website
    rows = rows_of(folder, 4)
    path = write_jsonl(folder / "c.jsonl", rows)
    remote, local = prepare.run(config(f"{url}/c.jsonl")), prepare.run(config(f"file://{path}"))
    assert captions(remote) == captions(local)
    with pytest.raises(DataError, match=r"data.source 'memory://beside/x.jsonl'"):
        prepare.run(config("memory://beside/x.jsonl"))


def test_sources_are_mixed_by_weight(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    for name, count in (("a", 40), ("b", 60)):
        (tmp_path / name).mkdir()
        rows = rows_of(tmp_path / name, count)
        for i, row in enumerate(rows):
            row["caption_condensed"] = f"{name} {i}"
            content = png(i if name == "a" else 100 + i, 8 if name == "a" else 9)
            (tmp_path / name / row["filename"]).write_bytes(content)
        write_jsonl(tmp_path / name / "c.jsonl", rows)
    mix = [
        {"source": str(tmp_path / "a" / "c.jsonl"), "weight": 2},
        {"source": str(tmp_path / "b" / "c.jsonl"), "weight": 0.5, "question": "And this?"},
    ]
    record = prepare.run(config("unused", mix=mix, test_share=0.2))
    train, test = read_split(record, "train"), read_split(record, "test")
    assert len(test) == 20
    said = Counter(row["conversations"][1]["value"] for row in train)
    assert {said[name] for name in said if name.startswith("a")} == {2}
    halves = [said[name] for name in said if name.startswith("b")]
    held_out = sum(row["conversations"][1]["value"].startswith("b") for row in test)
    assert set(halves) == {1}
    assert 0.25 < len(halves) / (60 - held_out) < 0.75
    images = stored_pictures(record)
    for row in train + test:
        name, number = row["conversations"][1]["value"].split()
        expected = png(int(number) if name == "a" else 100 + int(number), 8 if name == "a" else 9)
        assert images[row["image"]] == expected
        asked = row["conversations"][0]["value"]
        assert asked.endswith("And this?") == (name == "b")
    assert prepare.run(config("unused", mix=mix, test_share=0.2)) == record
    with pytest.raises(ConfigError, match="data.mix.1.weight"):
        config("unused", mix=[mix[0], {**mix[1], "weight": 0}])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_marks_and_wide_letters_are_read(
    tmp_path: Path, config: Callable[..., RunConfig], suffix: str, encoding: str
) -> None:
    """C8"""
    rows_of(tmp_path, 4)
    rows = [{"image": f"{i}.png", "caption": f"Schild “{i}”, 漢字."} for i in range(4)]
    text = {
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
        "csv": "image,caption\n" + "".join(f'{r["image"]},"{r["caption"]}"\n' for r in rows),
    }[suffix]
    if encoding == "utf-16-le-bom":
        content = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    else:
        content = text.encode(encoding)
    (tmp_path / f"c.{suffix}").write_bytes(content)
    record = prepare.run(config(tmp_path / f"c.{suffix}"))
    assert set(captions(record).values()) == {row["caption"] for row in rows}


def test_a_damaged_page_costs_its_rows(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    """C8"""
    rows = [
        {"image": {"bytes": png(i, 40), "path": None}, "caption": f"Sign {i}. " * 50}
        for i in range(30)
    ]
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    record = prepare.run(config(path, max_rejected_share=0.5))
    assert record.rejected == {"unreadable_row": 10}
    assert record.num_train + record.num_test == 20


TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
CELL = st.one_of(
    st.none(), st.integers(), st.floats(), st.booleans(), TEXT, st.binary(max_size=9),
    st.lists(st.one_of(TEXT, st.none(), st.dictionaries(TEXT, TEXT, max_size=2)), max_size=3),
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "from": st.sampled_from(["human", "gpt", "system", "x", None, 7]),
                "role": st.sampled_from(["user", "assistant", "tool"]),
                "value": st.one_of(TEXT, st.just("<image>"), st.none(), st.lists(TEXT)),
                "content": st.lists(
                    st.fixed_dictionaries(
                        {"type": st.sampled_from(["text", "image", "image_url", "video"])},
                        optional={
                            "text": TEXT,
                            "image_url": st.one_of(TEXT, st.just({"url": "0.png"})),
                        },
                    ),
                    max_size=2,
                ),
            },
        ),
        max_size=4,
    ),
)  # fmt: skip
NAMES = st.sampled_from(
    ["id", "image", "images", "caption", "text", "conversations", "messages", "question", "texts"]
)


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(NAMES, CELL, max_size=5), min_size=1, max_size=6))
def test_no_cell_ends_in_a_traceback(rows: list[dict[str, Any]]) -> None:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    table = Table(columns, len(rows), "", lambda _: iter(rows), None)
    try:
        reader = RowReader(table, DataConfig(source="x"))
    except DataError as error:
        assert "\n" not in str(error)
        return
    found = list(reader)
    assert len(found) == len(rows)
    for each in found:
        json.dumps(asdict(each), ensure_ascii=False, default=str).encode("utf-8")


def test_prepared_json_prepares_again_to_the_same_split(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows_of(tmp_path, 8)))
    first = prepare.run(config(source))
    folder = local_folder(first)
    with tarfile.open(folder / "images-00000.tar") as tar:
        tar.extractall(tmp_path / "images", filter="data")
    again = prepare.run(config(folder / "train.json", images=str(tmp_path / "images")))
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
