"""What prepare writes: the same bytes whatever happens, a few bytes of memory a row."""

import functools
import gc
import os
import pickle
import signal
import threading
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from PIL import Image
from small_data import png_of, write_dataset
from test_prepare import rows_of, write_jsonl

from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import DataConfig, RunConfig
from llava_ray.errors import ArtifactError, StorageError
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.models.dataset import Split
from llava_ray.prepare.checked import portions_of, stays_here
from llava_ray.prepare.parts import Part, opened_parts
from llava_ray.prepare.pictures import checked, content_digests, digest
from llava_ray.prepare.rows import Rejection, Row
from llava_ray.prepare.shards import DatasetWriter
from llava_ray.prepare.split import Shown

BYTES_A_ROW = 200
"""That the driver may hold."""


def samples(count: int) -> list[Sample]:
    return [
        Sample(
            f"row {i}", (f"{i % 7}.png",), (Turn(f"What is {i}?", 1, "Ünïcödé 漢字"),),
            pictures=(png_of(Image.new("RGB", (4, 4), (i % 7, 0, 0))),),
        )
        for i in range(count)
    ]  # fmt: skip


def test_neither_portions_nor_a_killed_worker_change_a_byte(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    rows = rows_of(tmp_path, 40)
    rows[3]["filename"] = "gone.png"
    data = config(write_jsonl(tmp_path / "c.jsonl", rows)).data
    flag = tmp_path / "died"
    with opened_parts(data) as (part,):

        def read() -> Iterator[Row | Rejection]:
            for row in part.open():
                if row.number == 20 and not flag.exists():
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row

        work = functools.partial(checked, max_pixels=10**6, with_files=True)
        mortal = replace(part, open=read)  # type: ignore[arg-type]
        found = [
            [each for portion in portions for each in pickle.loads(portion)]
            for portions in (portions_of(part, work), portions_of(mortal, work, size=3))
        ]
    assert flag.exists() and found[0] == found[1]
    names = [row["filename"] for row in rows]
    for name, each in zip(names, found[0], strict=True):
        files = getattr(each, "files", None)
        assert files == (None if name == "gone.png" else ((tmp_path / name).read_bytes(),))


def test_a_shard_is_closed_when_it_is_full_and_pictures_are_stored_once(tmp_path: Path) -> None:
    with_pictures = samples(30)
    writer = DatasetWriter(tmp_path, shard_bytes=2048)
    for sample in with_pictures:
        writer.add(Row(0, sample, content_digests(sample)))
    writer.finish(range(0, 30, 2), range(1, 30, 2))
    writer.close()
    assert len(list(tmp_path.glob("images-*.tar"))) == 4
    train, test = (Split(Storage(str(tmp_path)), name) for name in ("train", "test"))
    assert train.first(99) == with_pictures[::2] and test.first(99) == with_pictures[1::2]
    assert train.num_images.tolist() == [1] * 15 and set(train.letters.tolist()) == {20, 21}


def test_the_driver_holds_few_bytes_a_row(tmp_path: Path) -> None:
    count = 20_000
    turns = (Turn("What is it?", 1, "A sign."),)
    writer, shown, repeats = DatasetWriter(tmp_path), Shown(), array("i")
    gc.collect()
    tracemalloc.start()
    for i in range(count):
        sample = Sample(str(i), (f"{i}.png",), turns, pictures=(i.to_bytes(8, "big"),))
        row = Row(i, sample, (i.to_bytes(16, "big").hex(),))
        writer.add(row)
        shown.add(row)
        repeats.append(1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.close()
    assert held / count < BYTES_A_ROW


def test_without_an_index_it_is_no_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path, samples(3))
    os.unlink(tmp_path / "train.npz")
    with pytest.raises(ArtifactError, match="no train.npz; give a finished data set"):
        Split(Storage(str(tmp_path)), "train")


def test_what_fails_on_the_way_is_one_line() -> None:
    def gone() -> None:
        raise StorageError("s3://bucket: the server does not answer")

    unsendable = threading.Lock()

    with pytest.raises(StorageError) as caught:
        list(portions_of(Part(DataConfig(), 1.0, "", gone, unsendable, None), digest))  # type: ignore[arg-type]
    assert str(caught.value) == "s3://bucket: the server does not answer"


@pytest.mark.parametrize(
    ("cpus", "expected"), [([4], True), ([0], False), ([4, 4], False), ([0, 4], False)]
)
def test_tasks_leave_a_node_without_cpus_and_one_of_several(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], expected: bool
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": each} if each else {}} for each in cpus]
    gone = {"Alive": False, "Resources": {"CPU": 8}}
    monkeypatch.setattr(ray, "nodes", lambda: [gone, *nodes])
    assert stays_here() is expected


def test_pictures_travel_where_tasks_may_leave_the_node(
    tmp_path: Path, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(write_jsonl(tmp_path / "c.jsonl", rows_of(tmp_path, 10))).data
    found = []
    work = functools.partial(checked, max_pixels=10**6, with_files=False)
    with opened_parts(data) as (part,):
        for stays in (True, False):
            monkeypatch.setattr("llava_ray.prepare.checked.stays_here", lambda stays=stays: stays)
            found.append(list(portions_of(part, work)))
    assert found[0] == found[1]
