"""The sources of a data set, opened: one, or those of data.mix with their weights."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import DataConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.prepare.rows import RowReader
from llava_ray.prepare.sources import SCENE_TEXT, here_or_copied, open_table, place_and_name

SCENE_TEXT_ROWS = 240


@dataclass(frozen=True)
class Part:
    """One source, whose rows' own file or folder is on this machine."""

    config: DataConfig
    weight: float
    folder: str
    """Before the names of its pictures: several sources may have pictures of the same name."""
    open: Callable[[], RowReader]
    """Opens the rows once more, in another process of this machine."""
    reader: RowReader
    images: str | None
    """Where pictures lie that are not among the rows."""

    @property
    def has_files_here(self) -> bool:
        """Whether pictures are files of this machine, or among the rows."""
        return self.images is None or Storage(self.images).is_local

    def repeats(self, number: int) -> int:
        """Return how often a row is trained on in an epoch: the weight, its fraction by chance."""
        whole, fraction = divmod(self.weight, 1)
        key = f"{self.config.seed}:{self.folder}:{number}"
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
        here = config.model_copy(update={"source": str(captions)})
        read = functools.partial(_reader, here, SCENE_TEXT)
        return Part(config, weight, folder, read, read(), str(captions.parent / "images"))
    here = config.model_copy(update={"source": here_or_copied(config.source, Path(scratch))})
    read = functools.partial(_reader, here, config.source)
    images = config.images
    if images and "://" not in images and not Path(images).expanduser().is_dir():
        what = "a file, not a folder" if Path(images).expanduser().exists() else "no such folder"
        raise ConfigError(f"data.images {images!r}: {what}")
    reader = read()
    if not images and reader.folder == scratch and len(list(Path(scratch).iterdir())) == 1:
        # The rows' own file alone was copied, so its pictures are where it is.
        images = place_and_name(config.source)[0].rstrip("/")
    return Part(config, weight, folder, read, reader, images or reader.folder)


def _reader(config: DataConfig, name: str) -> RowReader:
    """Open the rows of a source on this machine, which people call by another name."""
    try:
        return RowReader(open_table(config), config)
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace(config.source, name)) from error
