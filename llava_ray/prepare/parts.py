"""The sources of a data set, opened: one, or those of data.mix with their weights."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.pictures import Read, hash_images, image_reader, store_images
from llava_ray.prepare.rows import Rejection, Row, RowReader
from llava_ray.prepare.sources import SCENE_TEXT, open_file, open_table

SCENE_TEXT_ROWS = 240


@dataclass(frozen=True)
class Part:
    """One source."""

    config: DataConfig
    weight: float
    folder: str
    """Below images/, where several sources may have pictures of the same name."""
    reader: RowReader
    read: Read

    def content_sha256(self) -> str:
        """Hash the rows, and the pictures that lie apart from them."""
        found = self.reader.sha256
        if self.reader.has_image_files:
            found += f" {hash_images(self.reader, self.read)}"
        return hashlib.sha256(found.encode()).hexdigest()

    def checked(self, images: Path) -> Iterator[Row | Rejection]:
        """Check all rows and store their pictures."""
        found = store_images(
            self.reader,
            self.read,
            target=images,
            folder=self.folder,
            max_pixels=self.config.max_image_pixels,
            num_rows=self.reader.num_rows,
        )
        for each in found:
            yield replace(each, repeats=self._repeats(each)) if isinstance(each, Row) else each

    def _repeats(self, row: Row) -> int:
        """Return the weight, its fraction by chance."""
        whole, fraction = divmod(self.weight, 1)
        key = f"{self.config.seed}:{self.folder}:{row.number}"
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        return int(whole) + (place < fraction)


@contextmanager
def opened_parts(config: DataConfig) -> Iterator[list[Part]]:
    """Open all sources, drawing first what is generated.

    Raises ConfigError for a source or columns that are not there, DataError for what they hold.
    """
    with ExitStack() as stack:
        yield [
            _open(each, weight, f"{index}/" if config.mix else "", stack)
            for index, (each, weight) in enumerate(config.parts())
        ]


def _open(config: DataConfig, weight: float, folder: str, stack: ExitStack) -> Part:
    scratch = stack.enter_context(TemporaryDirectory(prefix="llava_ray-data-"))
    if config.source == SCENE_TEXT:
        from llava_ray.embedded.scene_text import write_scene_text

        count = config.limit or SCENE_TEXT_ROWS
        captions = write_scene_text(Path(scratch), count=count, seed=config.seed)
        reader = RowReader(open_file(captions), config)
        return Part(config, weight, folder, reader, image_reader(str(captions.parent / "images")))
    try:
        table = open_table(config, Path(scratch))
    except (ConfigError, DataError) as error:
        # Of a copy nobody knows where it was.
        raise type(error)(str(error).replace(scratch, config.source)) from error
    images = config.images or (str(table.folder) if table.folder else None)
    if images == scratch and not config.images and len(list(Path(scratch).iterdir())) == 1:
        # The rows' own file alone was copied, so its pictures are where it is.
        images = config.source.rpartition("/")[0]
    if images and "://" not in images and not Path(images).expanduser().is_dir():
        raise ConfigError(f"data.images {config.images!r}: no such folder")
    return Part(config, weight, folder, RowReader(table, config), image_reader(images))
