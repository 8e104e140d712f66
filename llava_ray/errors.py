"""Every failure that a user can fix, each in one line.

LlavaRayError
├── ConfigError      a key or value in a config, an override or a job's arguments
├── DataError        captions or images that cannot be used
├── ArtifactError    an artifact that is missing, unfinished or differs from its manifest
├── ResourceError    the cluster or machine lacks what a stage asks for
│   └── StorageError     a disk is full or may not be written to, or a storage's server is gone
└── VariantError     one quantization method failed; the others go on

A message says what is wrong, the value seen and what to do. Each class takes only its
message, so that it survives pickling across Ray processes.
"""

from collections.abc import Callable, Iterable, Iterator


class LlavaRayError(Exception):
    """Root of all expected failures; job scripts print it in one line and exit with 2."""


class ConfigError(LlavaRayError):
    """A key or value in a config, an override or an argument is wrong."""


class DataError(LlavaRayError):
    """Captions or images cannot be used."""


class ArtifactError(LlavaRayError):
    """An artifact is missing, unfinished or differs from its manifest."""


class ResourceError(LlavaRayError):
    """The cluster or machine lacks what a stage asks for."""


class StorageError(ResourceError):
    """A disk is full or may not be written to, or a storage's server does not answer."""


class VariantError(LlavaRayError):
    """One quantization method failed."""


def said_by(checks: Iterable[Callable[[], object]]) -> Iterator[str]:
    """Run all checks, and yield what those say that fail."""
    for check in checks:
        try:
            check()
        except LlavaRayError as error:
            yield str(error)


def raise_all(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks; raise ConfigError with what all that fail say."""
    if mistakes := list(said_by(checks)):
        raise ConfigError("; ".join(mistakes))
