"""From the cells of a source to rows that can be used, or to the reason why not."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from llava_ray.config.run import DataConfig
from llava_ray.errors import DataError
from llava_ray.models.chat_template import IMAGE_TOKEN
from llava_ray.prepare.table import BrokenRow, Cells, Table

CONVERSATIONS = "conversations"


@dataclass(frozen=True)
class Row:
    """One image with its question and caption."""

    number: int
    """The row's number in the source, from 1."""
    id: str
    image: str | bytes
    """A path relative to the folder of images, or the file's bytes."""
    question: str
    caption: str
    further_exchanges: int = 0
    """Exchanges of a longer conversation that are left out."""


@dataclass(frozen=True)
class Rejection:
    """A row that is left out."""

    row: int
    id: str
    reason: str
    detail: str


class RowProblem(Exception):
    """Why a row is left out; never leaves this stage."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class RowReader:
    """Read LLaVA's own conversations, or a caption column beside images.

    Raises DataError for a table without rows, and for one that lacks a column.
    """

    def __init__(self, table: Table, config: DataConfig) -> None:
        self._table = table
        self._config = config
        if not table.num_rows:
            raise DataError(f"data.source {config.source!r} has no rows")
        self._is_llava = CONVERSATIONS in table.columns
        self.image_column = self._choose_image_column()
        needed = [self.image_column]
        needed.append(CONVERSATIONS if self._is_llava else config.caption_column)
        missing = [name for name in needed if name not in table.columns]
        if missing:
            raise DataError(
                f"data.source {config.source!r} has no column {', '.join(missing)}; it has "
                f"{', '.join(table.columns) or 'none'}: set data.image_column and "
                "data.caption_column"
            )
        extra = [name for name in ("id", config.image_column) if name in table.columns]
        self._columns = list(dict.fromkeys(needed + extra))

    @property
    def has_image_files(self) -> bool:
        """Whether images lie apart from the table."""
        return self.image_column not in self._table.binary_columns

    def __iter__(self) -> Iterator[Row | Rejection]:
        seen: set[str] = set()
        cells_of_rows = islice(self._table.read(self._columns), self._config.limit)
        for number, cells in enumerate(cells_of_rows, start=1):
            if isinstance(cells, BrokenRow):
                yield Rejection(number, "", "unreadable_row", cells.detail)
                continue
            row_id = self._row_id(cells)
            try:
                if row_id in seen:
                    raise RowProblem("duplicate_id", row_id)
                row = self._row(number, row_id, cells)
            except RowProblem as problem:
                yield Rejection(number, row_id, problem.reason, problem.detail)
                continue
            seen.add(row_id)
            yield row

    def _choose_image_column(self) -> str:
        """Prefer pictures inside the table unless a folder of images is named."""
        chosen = self._config.image_column
        if self._config.images is None and chosen not in self._table.binary_columns:
            for name in ("image", "images", *sorted(self._table.binary_columns)):
                if name in self._table.binary_columns:
                    return name
        return "image" if self._is_llava and chosen not in self._table.columns else chosen

    def _row_id(self, cells: Cells) -> str:
        for name in ("id", self._config.image_column, self.image_column):
            value = _first(cells.get(name))
            if isinstance(value, str | int) and str(value).strip():
                return str(value)
            if isinstance(value, bytes):
                return hashlib.sha256(value).hexdigest()[:16]
        return ""

    def _row(self, number: int, row_id: str, cells: Cells) -> Row:
        image = _first(cells.get(self.image_column))
        if not image:
            raise RowProblem("no_image", f"column {self.image_column!r} is empty")
        if isinstance(image, str):
            image = safe_path(image)
        elif not isinstance(image, bytes):
            raise RowProblem("no_image", f"a {type(image).__name__}, neither a path nor bytes")
        question, caption, further = self._config.question, self._caption(cells), 0
        if self._is_llava:
            question, caption, further = _first_exchange(cells[CONVERSATIONS])
        if not caption.strip():
            raise RowProblem("empty_caption", "")
        if IMAGE_TOKEN in caption:
            raise RowProblem("image_token_in_caption", _shorten(caption))
        return Row(number, row_id, image, question, caption.strip(), further)

    def _caption(self, cells: Cells) -> str:
        caption = cells.get(self._config.caption_column)
        if caption is not None and not isinstance(caption, str):
            raise RowProblem("empty_caption", f"a {type(caption).__name__}, not text")
        return caption or ""


def safe_path(text: str) -> str:
    """Return a path relative to the folder of images, normalized.

    Raises RowProblem for an absolute path and for one that could leave the folder.
    """
    path = PurePosixPath(text.replace("\\", "/"))
    leaves = path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", text)
    if leaves or "\0" in text or not path.parts:
        raise RowProblem("path_outside_folder", _shorten(text))
    return path.as_posix()


def _first(value: Any) -> Any:
    """Unwrap a list of images and datasets' {bytes, path}."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    return value


def _first_exchange(turns: Any) -> tuple[str, str, int]:
    try:
        human, gpt = turns[0], turns[1]
        asked, answer = human["value"], gpt["value"]
        speakers = (human["from"], gpt["from"])
    except (TypeError, KeyError, IndexError) as error:
        raise RowProblem("no_exchange", f"{type(error).__name__}: {error}") from error
    if speakers != ("human", "gpt") or not isinstance(asked, str) or not isinstance(answer, str):
        raise RowProblem(
            "no_exchange", f"the first turns are by {speakers[0]!r} and {speakers[1]!r}"
        )
    if asked.count(IMAGE_TOKEN) > 1:
        raise RowProblem("several_images", _shorten(asked))
    return asked.replace(IMAGE_TOKEN, "").strip(), answer, len(turns) // 2 - 1


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
