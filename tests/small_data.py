"""Data sets as prepare writes them, written and read by tests."""

import io
import tarfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import local_folder
from llava_ray.models.conversation import Sample
from llava_ray.models.dataset import open_split
from llava_ray.prepare.pictures import content_digests
from llava_ray.prepare.rows import Row
from llava_ray.prepare.shards import DatasetWriter


def write_dataset(folder: Path, train: Sequence[Sample], test: Sequence[Sample] = ()) -> None:
    """Write samples whose pictures are read."""
    with closing(DatasetWriter(folder)) as writer:
        for sample in (*train, *test):
            writer.add(Row(0, sample, content_digests(sample)))
        writer.finish(range(len(train)), range(len(train), len(writer)))


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def stored_pictures(record: DatasetRecord) -> dict[str, bytes]:
    """Return all pictures of a data set by their names."""
    found = {}
    for path in sorted(local_folder(record).glob("images-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None and member.name not in found
                found[member.name] = stream.read()
    return found


def stored_samples(record: DatasetRecord, *names: str) -> list[Sample]:
    """Return the rows of both sides, or of those named, with their pictures."""
    splits = [open_split(record, name) for name in names or ("train", "test")]
    return [sample for split in splits for sample in split.first(len(split))]
