"""Rows in the spellings of other trainers, and names that file systems alone know."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_odd_sources import rows_in, said, write
from test_prepare import png

from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.prepare.parts import opened_parts
from llava_ray.prepare.rows import Rejection, Row


def one(tmp_path: Path, row: dict[str, Any], **data: Any) -> Row | Rejection:
    (found,) = rows_in(write(tmp_path / "a.jsonl", json.dumps(row)), **data)
    return found


def sample(tmp_path: Path, row: dict[str, Any], **data: Any) -> Sample:
    found = one(tmp_path, row, **data)
    assert isinstance(found, Row), found
    return found.sample


def messages(*parts: Any, **answer: Any) -> dict[str, Any]:
    question = {"role": "user", "content": list(parts)}
    reply = {"role": "assistant", "content": "A sign.", **answer}
    return {"images": ["0.png", "1.png"], "messages": [question, reply]}


def picture(index: int) -> dict[str, Any]:
    return {"type": "image", "index": index}


def test_parts_say_which_picture_they_show(tmp_path: Path) -> None:
    question = {"type": "text", "text": "What is it?"}
    row = messages(picture(1), question, picture(0))
    assert sample(tmp_path, row).images == ("1.png", "0.png")
    row = messages(picture(0), question, picture(0), picture(1))
    assert sample(tmp_path, row).images == ("0.png", "0.png", "1.png")
    found = one(tmp_path, messages(picture(2), question))
    assert isinstance(found, Rejection) and found.reason == "no_image"


def test_an_answer_that_is_not_to_be_learned_is_refused(tmp_path: Path) -> None:
    found = one(tmp_path, messages(picture(0), picture(1), "What?", weight=0))
    assert isinstance(found, Rejection) and "weight 0" in found.detail


def test_a_rows_own_system_text_is_kept(tmp_path: Path) -> None:
    row = {"system": "Be kind.", **messages(picture(0), picture(1), "What?")}
    assert sample(tmp_path, row).system == "Be kind."


@pytest.mark.parametrize("text", ["<img>0.png</img>\nWhat?", "<|vision_start|><|image_pad|>What?"])
def test_pictures_in_another_models_tokens_are_refused(tmp_path: Path, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
    found = one(tmp_path, row)
    assert isinstance(found, Rejection) and found.reason == "no_image"


def test_a_token_that_comes_of_taking_one_out_is_taken_out_too(tmp_path: Path) -> None:
    row = {"image": "0.png", "question": "<im<image>age>What?", "answer": "A sign."}
    assert sample(tmp_path, row).turns == (Turn("What?", 1, "A sign."),)


@pytest.mark.parametrize(
    ("question", "answer"), [("prompt", "response"), ("instruction", "output"), ("query", "answer")]
)
def test_questions_are_known_by_their_usual_names(
    tmp_path: Path, question: str, answer: str
) -> None:
    row = {"image": "0.png", question: "What?", answer: "A sign."}
    assert sample(tmp_path, row).turns == (Turn("What?", 1, "A sign."),)


def test_a_question_column_may_be_named(tmp_path: Path) -> None:
    row = {"image": "0.png", "asked": "What?", "caption": 7}
    assert sample(tmp_path, row, question_column="asked").turns == (Turn("What?", 1, "7"),)


def test_the_image_column_goes_before_the_files_first_name(tmp_path: Path) -> None:
    row = {"image": "0.png", "filename": "orig.jpg", "caption": "A sign."}
    assert sample(tmp_path, row).images == ("0.png",)


def test_base64_without_a_header_is_a_picture(tmp_path: Path) -> None:
    file = png(1, 64) + bytes(200)
    text = base64.b64encode(file).decode()
    for image in (text, f"data:image/png;base64,{text}"):
        found = sample(tmp_path, {"image": image, "caption": "A sign."})
        assert found.pictures == (file,) and len(found.id) == 16
    found = one(tmp_path, {"image": "data:image/png;base64,", "caption": "A sign."})
    assert isinstance(found, Rejection) and found.reason == "unusable_image"


def test_absolute_names_below_the_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for images, name in (
        (f"file://{tmp_path}/real", f"{tmp_path}/real/0.png"),
        (f"{tmp_path}/link", f"{tmp_path}/real/0.png"),
        (f"{tmp_path}/real", f"file://{tmp_path}/link/0.png"),
    ):
        row = {"image": name, "caption": "A sign."}
        assert sample(tmp_path, row, images=images).images == ("0.png",)
    found = one(tmp_path, {"image": "s3://bucket/0.png", "caption": "A sign."})
    assert isinstance(found, Rejection) and "set data.images" in found.detail


def test_names_that_are_no_text_cost_their_row_alone(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"good"):
        for suffix, content in ((b".png", png(1)), (b".txt", b"A sign.")):
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name + suffix))).write_bytes(
                content
            )
    with opened_parts(DataConfig(source=str(tmp_path))) as (part,):
        found = list(part.reader)
    assert sorted(type(row).__name__ for row in found) == ["Rejection", "Row"]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a/" * 200 + "0.png"])
def test_a_name_that_no_file_can_have_is_no_traceback(tmp_path: Path, name: str) -> None:
    row = json.dumps({"image": name, "caption": "A sign."})
    for place in ("a", os.fsdecode(b"caf\xe9")):
        write(tmp_path / place / "x.jsonl", row)
    first, second = rows_in(tmp_path)
    assert isinstance(first, Row) and isinstance(second, Row)


@pytest.mark.parametrize("form", ["{}2017.jsonl", "captions_{}2014.jsonl", "{}1.jsonl"])
def test_digits_end_a_splits_name(tmp_path: Path, form: str) -> None:
    for split in ("train", "val"):
        row = json.dumps({"image": "0.png", "caption": split})
        write(tmp_path / form.format(split), row)
    assert list(said(tmp_path).values()) == ["train"]
    assert list(said(tmp_path, split="validation").values()) == ["val"]


def test_captioned_pictures_have_their_folders_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "test sign.png", png(1))
        write(tmp_path / split / "test sign.txt", f"of {split}")
    assert said(tmp_path) == {"train/test sign.png": "of train"}
    assert said(tmp_path, split="test") == {"test/test sign.png": "of test"}


def test_hidden_folders_are_left_out_and_links_are_followed(tmp_path: Path) -> None:
    row = '{"image": "0.png", "caption": "%s"}'
    write(tmp_path / "data/a.jsonl", row % "a")
    write(tmp_path / "data/.ipynb_checkpoints/a.jsonl", row % "old")
    write(tmp_path / "data/.git/x.json", "{}")
    write(tmp_path / "elsewhere/b.jsonl", row % "b")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "data")
    rows = [row for row in rows_in(tmp_path / "data") if isinstance(row, Row)]
    assert [row.sample.turns[0].answer for row in rows] == ["a", "b"]


def test_what_stands_beside_an_unread_picture_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.png", "1.svg"):
        write(tmp_path / name, png(1))
        write((tmp_path / name).with_suffix(".txt"), "A sign.")
    with caplog.at_level("WARNING"):
        assert len(rows_in(tmp_path)) == 1
    assert "1 .txt files have no picture beside them that is read, first '1'" in caplog.text


def test_img2datasets_tables_lie_beside_its_tars(tmp_path: Path) -> None:
    write(tmp_path / "000.tar", b"")
    write(tmp_path / "000_stats.json", "{}")
    parquet.write_table(pyarrow.table({"caption": ["x"]}), tmp_path / "000.parquet")
    with pytest.raises(Exception, match="000.tar.*no whole tar") as caught:
        rows_in(tmp_path)
    assert not isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


def test_text_that_is_not_utf_8_costs_one_row_of_a_row_group(tmp_path: Path) -> None:
    texts = [b"A sign."] * 100
    texts[50] = b"caf\xe9"
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    names = [f"{n}.png" for n in range(100)]
    parquet.write_table(pyarrow.table({"image": names, "caption": column}), tmp_path / "a.parquet")
    found = rows_in(tmp_path / "a.parquet")
    assert [row.row for row in found if isinstance(row, Rejection)] == [51]
