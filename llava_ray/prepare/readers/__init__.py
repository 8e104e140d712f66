"""Forms of data files. A new one is a file in this folder that has a READER."""

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llava_ray.prepare.table import Table


@dataclass(frozen=True)
class Reader:
    """One form of data files."""

    suffix: str
    """Such as `.parquet`, in lower case."""
    form: str
    """What a file of it looks like, for README."""
    open: Callable[[Path], Table]
    """Raises DataError where the file is not of that form; an OSError is handled by the caller."""
    also: tuple[str, ...] = ()
    """Other suffixes of the same form."""


@functools.cache
def readers() -> dict[str, Reader]:
    """Return the reader of each suffix."""
    names = (f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__))
    found = [import_module(name).READER for name in names]
    return {suffix: reader for reader in found for suffix in (reader.suffix, *reader.also)}
