"""What goes wrong below a storage, each in one line: full, refused, no such bucket, gone.

Libraries name such failures in their own ways: by errno, by a class that cannot be imported where
the library is missing, or in the message alone.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from llava_ray.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

GONE_S = 120.0
"""How long a server may be gone before a stage gives up; each library's own retries come first."""
_LONGEST_PAUSE_S = 8.0

# Words of safetensors, PyTorch and programs that were started; numpy's for a write cut short.
_FULL = re.compile(
    r"os error (28|122)\b|code: (28|122)\b|No space left on device|Disk quota exceeded"
    r"|\d requested and \d+ written|PytorchStreamWriter failed writing file"
)
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "TokenRetrievalError", "UnauthorizedSSOTokenError", "DefaultCredentialsError", "RefreshError",
}  # fmt: skip
_INVALID = {"ParamValidationError", "InvalidEndpointConfigurationError"}
# Python's, botocore's, aiohttp's, httpx's and fsspec's; what stands for them is derived from these.
_GONE = {
    "ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError", "TransportError",
}  # fmt: skip
# Arrow's, through which Ray Train and Tune write.
_GONE_TEXT = re.compile(r"AWS Error (NETWORK_CONNECTION|SERVICE_UNAVAILABLE|SLOW_DOWN)|curlCode")


@contextmanager
def disk_errors(where: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StorageError that names the place."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if fault := disk_fault(error, where):
            raise fault from error
        raise


def disk_fault(error: BaseException, where: str) -> StorageError | None:
    """Return what a full or read-only disk comes to, or None for any other failure."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
        return StorageError(
            f"no space left at {where}: free some, or set storage.uri to another disk; "
            "finished artifacts are kept"
        )
    if isinstance(error, OSError) and code in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StorageError(f"cannot write to {where}: {error.strerror}")
    return None


def patiently(
    call: Callable[[], T], uri: str, *, wait_s: float | None = None, setting: str = "storage.uri"
) -> T:
    """Call a remote file system, again and again while its server is gone.

    wait_s: for how long; default GONE_S. setting: what names the URI. Raises ConfigError for a
    missing bucket and for missing or refused credentials, StorageError for a server that stays
    away.
    """
    start, pause_s = time.monotonic(), 0.5
    limit_s = GONE_S if wait_s is None else wait_s
    while True:
        try:
            return call()
        except Exception as error:
            if not is_gone(error):
                if fault := _refusal(error, f"{setting} {uri!r}"):
                    raise fault from error
                raise
            waited = time.monotonic() - start
            if waited + pause_s > limit_s:
                raise StorageError(
                    f"{uri} does not answer for {waited:.0f} s ({_first_line(error)}): see that "
                    "its server runs and that this node reaches it; the same command goes on"
                ) from error
            logger.warning("%s does not answer (%s); again in %.0f s", uri, _first_line(error),
                           pause_s)  # fmt: skip
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def is_gone(error: BaseException) -> bool:
    """Say whether a failure is that of a server that does not answer, or is too busy to."""
    if isinstance(error, OSError) and error.errno in (errno.EREMOTEIO, errno.EBUSY):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _GONE or _GONE_TEXT.search(str(error)))


def is_missing_bucket(error: BaseException) -> bool:
    """Say whether a file was not found because its bucket is not there."""
    return "bucket does not exist" in str(error) or "NoSuchBucket" in str(error)


def _refusal(error: Exception, named: str) -> ConfigError | None:
    if type(error).__name__ in _NO_CREDENTIALS:
        return ConfigError(
            f"{named}: no credentials on this node ({_first_line(error)}): set them in "
            "each node's environment (AWS_ACCESS_KEY_ID, ...) or give nodes an instance profile"
        )
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{named}: its server refuses this node's credentials ({_first_line(error)})"
        )
    if type(error).__name__ in _INVALID or "Invalid endpoint" in str(error):
        return ConfigError(f"{named} cannot be asked ({_first_line(error)}): correct it")
    return missing_bucket(named) if is_missing_bucket(error) else None


def missing_bucket(named: str) -> ConfigError:
    """Return what to say of a bucket that is not there."""
    return ConfigError(
        f"{named}: there is no such bucket (none is made): correct it, or make it first"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
