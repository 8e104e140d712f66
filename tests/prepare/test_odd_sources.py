"""Sources that were read otherwise than their owners meant, and said nothing."""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from test_prepare import png, rows_of, write_jsonl
from test_sources import captions

from llava_ray import prepare
from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.rows import Rejection, Row, RowReader
from llava_ray.prepare.sources import open_table


def rows_in(source: Path, **data: Any) -> list[Row | Rejection]:
    config = DataConfig(source=str(source), **data)
    return list(RowReader(open_table(config), config))


def said(source: Path, **data: Any) -> dict[str, str]:
    """Return the answer by each picture's name, and reasons of rejections by their numbers."""
    found = {}
    for row in rows_in(source, **data):
        if isinstance(row, Rejection):
            found[str(row.row)] = row.reason
        else:
            found[", ".join(row.sample.images)] = row.sample.turns[-1].answer or ""
    return found


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("form", ["{}/part-0.csv", "data/{}-0001.csv", "my_{}.csv"])
def test_files_of_another_split_are_left_out(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        write(tmp_path / form.format(split), f"image,caption\n{split}.png,of {split}\n")
    for split in ("train", "test"):
        assert list(said(tmp_path, split=split).values()) == [f"of {split}"]
    with pytest.raises(ConfigError, match="data.split 'validation': .* has test, train"):
        rows_in(tmp_path, split="validation")


def test_a_split_is_a_word_of_a_name(tmp_path: Path) -> None:
    write(tmp_path / "strained.csv", "image,caption\n1.png,one\n")
    write(tmp_path / "other.csv", "image,caption\n2.png,two\n")
    assert said(tmp_path) == {"1.png": "one", "2.png": "two"}


def test_pictures_lie_beside_the_table_that_names_them(tmp_path: Path) -> None:
    for place in (".", "a", "b"):
        write(tmp_path / place / "0.png", b"picture")
        write(
            tmp_path / place / "metadata.jsonl",
            json.dumps({"file_name": "0.png", "text": f"in {place}"}),
        )
    write(tmp_path / "deep/x.png", b"picture")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "all.jsonl")
    assert said(tmp_path) == {"0.png": "in .", "a/0.png": "in a", "b/0.png": "in b"}


def test_a_named_image_column_goes_before_other_bytes(tmp_path: Path) -> None:
    row = {"image": "0.png", "thumbnail": png(1), "caption": "A sign."}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = rows_in(tmp_path / "a.parquet")
    assert isinstance(found, Row)
    assert (found.sample.images, found.sample.pictures) == (("0.png",), (b"",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'i,caption\n1.jpg,"one\n2.jpg,two\n3.jpg,three"\n4.jpg,four\n',
            ["unreadable_row", "two", 'three"', "four"],
        ),
        ('i,caption\n1.jpg,one\n2.jpg,"two\n3.jpg,three\n', ["one", "unreadable_row", "three"]),
        (
            'i,caption\n1.jpg,"one:\nfig1.png, a chart\nend"\n2.jpg,two\n',
            ["one:\nfig1.png, a chart\nend", "two"],
        ),
        ('i,caption\n1.jpg,"one" and more\n2.jpg,two\n', ["unreadable_row", "two"]),
        ('i,caption\n1.jpg,"two\nlines, with a comma"\n', ["two\nlines, with a comma"]),
        ("sep=;\ni;caption\n1.jpg;a, b\n", ["a, b"]),
        ("\n\ni, caption\n1.jpg, one\n", ["one"]),
        ('"i;x;y;z",caption\n1.jpg,one\n', ["one"]),
        ("i\tcaption\n1.jpg\ta, b\n", ["a, b"]),
        ("I,Caption\n1.jpg,one\n", ["one"]),
        (b"i,caption\n1.jpg,one\n2.jpg,\xff\xfe\n3.jpg,three\n", ["one", "broken_text", "three"]),
        ("i,caption\n1.jpg,日本語\n".encode("utf-16-le"), ["日本語"]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_as_spreadsheets_write_them(
    tmp_path: Path, text: str | bytes, expected: list[str], suffix: str
) -> None:
    column = {"image_column": "i"}
    if isinstance(text, str) and '"i;x' in text:
        column = {"image_column": "i;x;y;z"}
    if isinstance(text, str) and text.startswith("I,"):
        column = {"image_column": "I"}
    path = write(tmp_path / f"a.{suffix}", text)
    assert list(said(path, **column).values()) == expected


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns are called 'caption'"):
        rows_in(write(tmp_path / "a.csv", "image,caption,caption\n1.jpg,one,two\n"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["日本語の看板 1", "a\u2028b\u0085c"])
def test_json_lines_of_every_unicode_encoding(tmp_path: Path, encoding: str, text: str) -> None:
    line = json.dumps({"image": "1.jpg", "caption": text}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", f"{line}\n{line}\n".encode(encoding))
    assert said(path) == {"1.jpg": text}


def test_captions_in_utf_16_beside_pictures(tmp_path: Path) -> None:
    write(tmp_path / "1.jpg", b"picture")
    write(tmp_path / "1.txt", "a cat".encode("utf-16-le"))
    write(tmp_path / "2.jpg", b"picture")
    write(tmp_path / "2.txt", "ab\0cat")
    assert said(tmp_path) == {"1.jpg": "a cat", "2": "broken_text"}


def tar_of(path: Path, files: Sequence[tuple[str, str | bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member, data = tarfile.TarInfo(name), content if isinstance(content, bytes) else b""
            data = data or str(content).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_webdataset_samples_keep_their_captions_and_pictures(tmp_path: Path) -> None:
    def read(*files: tuple[str, str | bytes]) -> list[tuple[list[bytes], str | None]]:
        rows = rows_in(tar_of(tmp_path / "a.tar", files))
        good = [row.sample for row in rows if isinstance(row, Row)]
        assert len(good) == len(rows)
        return [(list(sample.pictures), sample.turns[-1].answer) for sample in good]

    assert read(("1.jpg", b"p"), ("1.txt", "one"), ("1.cls", "7")) == [([b"p"], "one")]
    dotted = [(f"i_0.{n}5.{kind}", f"{kind} {n}") for n in (0, 1) for kind in ("jpg", "txt")]
    assert read(*dotted) == [([b"jpg 0"], "txt 0"), ([b"jpg 1"], "txt 1")]
    assert read(("1.mask.png", b"m"), ("1.jpg", b"p"), ("1.txt", "one")) == [([b"p"], "one")]
    again = [("1.jpg", b"p"), ("1.txt", "one"), ("1.jpg", b"q"), ("1.txt", "two")]
    assert read(*again) == [([b"p"], "one"), ([b"q"], "two")]
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Two."}]
    named = {"image": ["1.0.jpg", "1.1.jpg"], "conversations": turns}
    several = [("1.1.jpg", b"second"), ("1.0.jpg", b"first"), ("1.json", json.dumps(named))]
    assert read(*several) == [([b"first", b"second"], "Two.")]


def test_several_kinds_of_data_in_one_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.jpg", b"picture")
    write(tmp_path / "1.txt", "a cat")
    write(tmp_path / "notes.json", '[{"image": "1.jpg", "caption": "note"}]')
    with pytest.raises(ConfigError, match="several kinds of data: name one of notes.json beside"):
        rows_in(tmp_path)
    write(tmp_path / "both/metadata.csv", "file_name,text\n")
    write(tmp_path / "both/metadata.jsonl", "{}")
    with pytest.raises(ConfigError, match="several kinds of data"):
        rows_in(tmp_path / "both")


def test_what_rows_show_besides_one_image(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A sign."}]
    rows = [
        {"image": "1.jpg", "conversations": turns},
        {"images": ["2.jpg"], "conversations": turns},
        {"video": "3.mp4", "conversations": turns},
        {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, turns[1]]},
    ]
    path = write(tmp_path / "a.json", json.dumps({"data": rows}))
    expected = {"1.jpg": "A sign.", "2.jpg": "A sign.", "3": "no_picture", "4": "no_picture"}
    assert said(path) == expected


def test_an_answer_goes_with_its_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.csv", "image,question,text,answer\n1.jpg,What colour?,OCR,Red\n")
    assert said(path) == {"1.jpg": "Red"}
    rows = [{"image": "1.jpg", "captions": ["one", "two"]}] * 3
    with caplog.at_level(logging.WARNING):
        assert said(write_jsonl(tmp_path / "b.jsonl", rows)) == {"1.jpg": "one"}  # type: ignore[arg-type]
    assert [r.message for r in caplog.records].count(
        "prepare: column 'captions' has lists: the first is used"
    ) == 1


def test_names_of_pictures(tmp_path: Path) -> None:
    names = ["x:y.jpg", "a::b.jpg", f"{tmp_path}/in.jpg", "/etc/out.jpg", "C:\\out.jpg"]
    rows = [{"image": name, "caption": name} for name in names]
    found = said(write_jsonl(tmp_path / "a.jsonl", rows))  # type: ignore[arg-type]
    assert list(found) == ["x:y.jpg", "a::b.jpg", "in.jpg", "4", "5"]
    assert found["4"] == found["5"] == "path_outside_folder"


def test_openai_response_parts(tmp_path: Path) -> None:
    parts = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": "1.jpg"},
    ]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "A sign."}]}
    row = {"messages": [{"role": "user", "content": parts}, answer]}
    assert said(write(tmp_path / "a.json", f"{json.dumps(row)}\n{json.dumps(row)}\n")) == {
        "1.jpg": "A sign."
    }


def test_a_damaged_saved_data_set_has_broken_rows(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": f"Sign {i}, with words enough."} for i in range(200)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "ds"))
    (arrow,) = (tmp_path / "ds").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    place = content.index(b"Sign 0, with")
    content[place - 900 : place - 100] = b"\xff" * 800
    arrow.write_bytes(content)
    try:
        found = rows_in(tmp_path / "ds")
    except DataError:
        return
    assert len(found) == 200


def test_the_same_picture_in_two_formats_is_on_one_side(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    """C7, by what pictures show"""
    rows = []
    for i in range(8):
        image = Image.new("RGB", (6, 5), (20 * i, 30, 200 - i))
        for kind in ("png", "bmp", "webp"):
            image.save(tmp_path / f"{i}.{kind}", lossless=True)
            rows.append({"image": f"{i}.{kind}", "caption": f"Sign {i}."})
    record = prepare.run(config(write_jsonl(tmp_path / "a.jsonl", rows), test_share=0.4))  # type: ignore[arg-type]
    sides = [
        {row["image"].partition(".")[0] for row in json.loads(content or "")}
        for content in (Storage(record.uri).read_text(f"{name}.json") for name in ("train", "test"))
    ]
    assert len(sides[0]) + len(sides[1]) == 8 and not sides[0] & sides[1]


def test_rejected_rows_are_listed_where_no_data_set_is_made(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows = rows_of(tmp_path, 4)
    rows += [{"filename": "gone.png", "caption_condensed": "Gone."}] * 9
    with pytest.raises(DataError, match="9 missing_file.*all are listed in ") as caught:
        prepare.run(config(write_jsonl(tmp_path / "a.jsonl", rows)))  # type: ignore[arg-type]
    listed = Path(str(caught.value).rpartition("all are listed in ")[2])
    assert len(listed.read_text().splitlines()) == 9


def test_a_source_of_a_mix_without_a_good_row_is_an_error(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", rows_of(tmp_path, 8))  # type: ignore[arg-type]
    bad = write_jsonl(
        tmp_path / "bad.jsonl", [{"filename": "gone.png", "caption_condensed": "Gone."}]
    )
    mix = [{"source": str(good)}, {"source": str(bad)}]
    with pytest.raises(DataError, match="data.mix: none of the rows of .*bad.jsonl"):
        prepare.run(config(good, mix=mix, max_rejected_share=0.5))
    with pytest.raises(ConfigError, match="weight"):
        config(good, mix=[{"source": str(good), "weight": 1e9}])


def test_the_pixels_trained_on_are_those_checked(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    record = prepare.run(config(write_jsonl(tmp_path / "a.jsonl", rows_of(tmp_path, 4))))  # type: ignore[arg-type]
    assert captions(record).keys() == {f"{i}.png" for i in range(4)}
