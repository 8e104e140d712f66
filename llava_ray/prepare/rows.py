"""From the cells of a source to rows that can be used, or to the reason why not."""

import base64
import binascii
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from llava_ray.config.run import DataConfig
from llava_ray.errors import DataError
from llava_ray.models.chat_template import IMAGE_TOKEN, Turn
from llava_ray.models.conversation import Sample
from llava_ray.prepare.dialogue import Dialogue, RowProblem, read_dialogue, shorten, without_images
from llava_ray.prepare.table import FOLDER, BrokenRow, Cells, Table

logger = logging.getLogger(__name__)

CONVERSATIONS = ("conversations", "messages", "conversation", "texts")
IMAGES = (
    "image", "images", "filename", "file_name", "image_path", "image_file", "img", "path",
    "jpg", "jpeg", "png", "webp", "image_url", "url", "image_file_name", "image_file_names",
    "images_file_names", "image_filename",
)  # fmt: skip
CAPTIONS = ("caption_condensed", "caption", "text", "txt", "captions", "sentence", "answer")
QUESTIONS = ("question", "query", "prompt", "instruction")
ANSWERS = ("answer", "response", "output", "completion")
"""Captions where there is a question."""
MOVING = ("video", "videos", "audio")
"""Columns of what no picture shows."""
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp"}
IDS = ("id", "__key__", "image_id")
_LONGEST_NAME = 255
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
_MARKED = re.compile(r"<img>[^<>\n]+</img>|<\|(?:image_pad|vision_start|image_1)\|>")
"""Pictures as other models' own formats have them."""
_MOVES = re.compile(r"\A<(video|audio)>\n|\n<(video|audio)>\Z")
"""A token on a line of its own; within a text it is HTML."""


@dataclass(frozen=True)
class Row:
    """One conversation about any number of pictures."""

    number: int
    """The row's number in the source, from 1."""
    sample: Sample
    """Its pictures are paths relative to the folder of images, or were among the rows."""
    contents: tuple[str, ...] = ()
    """The SHA-256 of its pictures' files, once they are read."""
    pixels: tuple[str, ...] = ()
    """A hash of what each shows."""


@dataclass(frozen=True)
class Rejection:
    """A row that is left out."""

    row: int
    id: str
    reason: str
    detail: str


class RowReader:
    """Read conversations, or a caption column beside images.

    Raises DataError for a table without rows, and for one in which no column is recognised.
    """

    def __init__(self, table: Table, config: DataConfig) -> None:
        self._table, self._config = table, config
        if not table.num_rows:
            raise DataError(f"data.source {config.source!r} has no rows")
        self._said = None if config.caption_column else _first_of(CONVERSATIONS, table.columns)
        question = config.question_column or _first_of(QUESTIONS, table.columns)
        known = (*ANSWERS, *CAPTIONS) if question else CAPTIONS
        self._caption = config.caption_column or _first_of(known, table.columns)
        self.image_column = self._choose_image_column()
        self._check()
        self._question = question if self._said is None and self._caption != question else None
        asks = self._question or ""
        self._input = _first_of(["input"], table.columns) if asks.lower() == "instruction" else None
        self._id = _first_of(IDS, table.columns)
        self._system = _first_of(["system"], table.columns) if self._said else None
        self._moving = [name for name in MOVING if name in table.columns]
        alone = config.image_column or self.image_column in table.binary_columns
        others = () if alone else _all_of(IMAGES, table.columns)
        self._pictures = [name for name in dict.fromkeys((self.image_column, *others)) if name]
        """The image column, and those that are looked into where it is empty."""
        images = config.images or self.folder or ""
        images = images.removeprefix("file://")
        self._root = images if "://" in images else str(Path(images).expanduser().absolute())
        self._lists = 0
        chosen = (
            self._said, self._caption, *self._pictures, self._question, self._input, self._system,
            self._id, *self._moving,
        )  # fmt: skip
        self.columns = list(dict.fromkeys(filter(None, chosen)))
        """What is read."""

    @property
    def num_rows(self) -> int:
        """How many there are, as far as data.limit goes."""
        return min(self._table.num_rows, self._config.limit or self._table.num_rows)

    @property
    def sha256(self) -> str:
        """The digest of the rows' content; image files lying apart are not part of it."""
        return self._table.sha256

    @property
    def folder(self) -> str | None:
        """Where the table's own folder has pictures, if it has one."""
        return str(self._table.folder) if self._table.folder else None

    @property
    def has_image_files(self) -> bool:
        """Whether images lie apart from the table, or some may."""
        inside = self.image_column in self._table.binary_columns
        # A message may name a file.
        return not inside or self._table.names_files or self._said == "messages"

    def __iter__(self) -> Iterator[Row | Rejection]:
        cells_of_rows = islice(self._table.read(self.columns), self._config.limit)
        for number, cells in enumerate(cells_of_rows, start=1):
            if isinstance(cells, BrokenRow):
                yield Rejection(number, "", "unreadable_row", cells.detail)
                continue
            try:
                yield self._row(number, cells)
            except RowProblem as problem:
                where = printable(shorten(self._row_id(number, cells)))
                yield Rejection(number, where, problem.reason, printable(problem.detail))

    def _choose_image_column(self) -> str | None:
        """Prefer pictures inside the table unless a folder of images is named."""
        columns, binary = self._table.columns, self._table.binary_columns
        if self._config.image_column is not None:
            return self._config.image_column
        apart = _first_of(IMAGES, [name for name in columns if name not in binary])
        if self._config.images is not None or not binary:
            return apart
        inside = _first_of(IMAGES, sorted(binary)) or (sorted(binary)[0] if not apart else None)
        if inside and inside.lower() not in IMAGES:
            logger.info("prepare: pictures are read from the column %r (data.image_column)", inside)
        return inside or apart

    def _check(self) -> None:
        columns, source = self._table.columns, self._config.source
        wanted = {
            "image_column": self.image_column, "caption_column": self._said or self._caption
        }  # fmt: skip
        if self._config.question_column is not None:
            wanted["question_column"] = self._config.question_column
        if self._said is not None and self._config.image_column is None:
            del wanted["image_column"]  # Of text alone, or with its pictures in the messages.
        problems = [
            f"no column {name!r}" if name else f"none that is known as {key.split('_')[0]}"
            for key, name in wanted.items()
            if name not in columns
        ]
        if problems:
            keys = ", ".join(f"data.{key}" for key in wanted)
            raise DataError(
                f"data.source {source!r} has {' and '.join(problems)}; it has "
                f"{', '.join(columns) or 'none'}: set {keys}"
            )

    def _row_id(self, number: int, cells: Cells) -> str:
        value = cells.get(self._id) if self._id else None
        if value is None and self.image_column:
            value = next(iter(as_list(cells.get(self.image_column))), None)
        if isinstance(value, str) and (value[:5].lower() == "data:" or len(value) > _LONGEST_NAME):
            value = value.encode(errors="surrogatepass")  # A picture itself.
        if isinstance(value, str | int) and str(value).strip():
            return str(value)
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()[:16]
        return str(number)

    def _row(self, number: int, cells: Cells) -> Row:
        row_id = self._row_id(number, cells)
        for name in self._moving:
            if cells.get(name):
                raise RowProblem("no_picture", f"column {name!r}: only pictures are read")
        shown = (as_list(cells.get(name)) for name in self._pictures)
        pictures = next(filter(None, shown), [])
        alone = self._caption and cells.get(self._said or "") is None and cells.get(self._caption)
        if self._said is not None and not alone:
            found = read_dialogue(cells.get(self._said), pictures)
            system = cells.get(self._system or "")
            if isinstance(system, str) and system.strip() and found.system is None:
                found = replace(found, system=system.strip())
        else:
            found = self._captioned(cells, pictures)
        images = [self._image(each, cells.get(FOLDER, "")) for each in found.images]
        names, files = tuple(name for name, _ in images), tuple(file for _, file in images)
        row = Row(number, Sample(row_id, names, found.turns, found.system, files))
        for text in (row_id, found.system, *(t for turn in found.turns for t in _texts(turn))):
            _check_text(text)
        if token := next(filter(None, (_MOVES.search(turn.text) for turn in found.turns)), None):
            raise RowProblem("no_picture", f"{token[0].strip()}: only pictures are read")
        if token := next(filter(None, (_MARKED.search(turn.text) for turn in found.turns)), None):
            detail = f"{shorten(token[0])}: name it in a column, and write {IMAGE_TOKEN}"
            raise RowProblem("no_image", detail)
        return row

    def _image(self, value: Any, folder: str) -> tuple[str, bytes]:
        """Return a picture's name, below the folder of images, and its file if it is in the row."""
        name, file = _image(value, self._root)
        if folder and not file and not self._config.images:
            # Names mostly start where the row's own file lies, else at the source's folder.
            own = f"{folder}/{name}"
            name = own if os.path.isfile(f"{self._root}/{own}") else name
            _check_text(name)
        return name, file

    def _captioned(self, cells: Cells, pictures: Sequence[Any]) -> Dialogue:
        if not pictures:
            detail = f"column {self.image_column!r} is empty: data.image_column names another"
            raise RowProblem("no_image", detail)
        captions = as_list(cells.get(self._caption or ""))
        if len(captions) > 1:
            self._lists += 1
            if self._lists == 1:
                logger.warning("prepare: column %r has lists: the first is used", self._caption)
        caption = next(iter(captions), "")
        if isinstance(caption, int | float) and not isinstance(caption, bool):
            caption = str(caption)  # An answer may be a number.
        if not isinstance(caption, str):
            raise RowProblem("empty_caption", f"a {type(caption).__name__}, not text")
        if not caption.strip():
            detail = f"column {self._caption!r} is empty: data.caption_column names another"
            raise RowProblem("empty_caption", detail)
        if IMAGE_TOKEN in caption:
            raise RowProblem("image_token_in_caption", shorten(caption))
        question = cells.get(self._question) if self._question else None
        if not isinstance(question, str) or not question.strip():
            question = self._config.question
        more = cells.get(self._input) if self._input else None
        if isinstance(more, str) and more.strip():
            question = f"{question}\n{more.strip()}"
        question = without_images(question)
        turn = Turn(question, len(pictures), caption.strip())
        return Dialogue((turn,), tuple(pictures))


def _texts(turn: Turn) -> tuple[str, str]:
    return turn.text, turn.answer or ""


def _check_text(text: str | None) -> None:
    """Refuse what no text holds: a NUL, bytes that are no UTF-8, half of a UTF-16 character."""
    if "\0" in (text or ""):
        raise RowProblem("broken_text", f"{shorten(text or '')!r}: it holds a NUL")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{printable(shorten(text or ''))}: {error.reason} at {error.start}"
        if "\udc80" <= error.object[error.start] <= "\udcff":
            detail += "; the file is not UTF-8: save it so (Excel: CSV UTF-8)"
        raise RowProblem("broken_text", detail) from error


def printable(text: str) -> str:
    """Return a text that any file can hold."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def _image(value: Any, root: str) -> tuple[str, bytes]:
    """Return a picture's name below a folder, and its file where it is among the rows."""
    if isinstance(value, bytes):
        suffix = next((s for magic, s in _SUFFIXES.items() if value.startswith(magic)), ".webp")
        return hashlib.sha256(value).hexdigest()[:16] + suffix, value
    if not isinstance(value, str):
        raise RowProblem("no_image", f"a {type(value).__name__}, neither a path nor bytes")
    if value[:5].lower() == "data:":
        return _image(_inline(value), root)
    if len(value) > _LONGEST_NAME and _BASE64.fullmatch(value):
        return _image(_inline(f"data:;base64,{value}"), root)
    _check_text(value)
    if re.match(r"https?://", value) and not value.startswith(f"{root}/"):
        raise RowProblem("remote_image", f"{shorten(value)}: download it, and name the file")
    path = value.removeprefix("file://")
    below = path.removeprefix(f"{root.rstrip('/')}/") if root else path
    if "://" in below:
        detail = f"{shorten(value)}: set data.images to the folder that it starts with"
        raise RowProblem("path_outside_folder", detail)
    if below.startswith("/") and root:
        # By another name of the same folder.
        real = f"{os.path.realpath(root)}/"
        below = os.path.realpath(below).removeprefix(real)
        below = path if below.startswith("/") else below
    return safe_path(below), b""


def _inline(url: str) -> bytes:
    header, _, payload = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("not base64")
        found = base64.b64decode("".join(unquote(payload).split()), validate=True)
        if not found:
            raise ValueError("it is empty")
        return found
    except (ValueError, binascii.Error) as error:
        raise RowProblem("unusable_image", f"a broken data URL ({error})") from error


def safe_path(text: str) -> str:
    """Return a path relative to the folder of images, normalized.

    Raises RowProblem for an absolute path and for one that could leave the folder.
    """
    path = PurePosixPath(text.replace("\\", "/"))
    leaves = path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", text)
    if leaves or "\0" in text or not path.parts:
        detail = f"{shorten(text)}: name it relative to data.images"
        raise RowProblem("path_outside_folder", detail)
    return path.as_posix()


def as_list(value: Any) -> list[Any]:
    """Return a cell's values, datasets' {bytes, path} unwrapped and empty ones left out."""
    values = value if isinstance(value, list) else [value]
    opened = (
        v.get("bytes") or v.get("path")
        if isinstance(v, dict) and {"bytes", "path"} & v.keys()
        else v
        for v in values
    )
    return [each for each in opened if each not in (None, "", b"")]


def _all_of(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns of these names, whatever letters are capital, in the names' order."""
    return [column for name in names for column in columns if column.lower() == name]


def _first_of(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next(iter(_all_of(names, columns)), None)
