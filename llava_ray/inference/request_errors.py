"""Failures of one request, each with its status and OpenAI error code.

They cross from an engine's process to its replica as `plain`.
"""

from typing import Any

from llava_ray.errors import LlavaRayError


class ApiError(LlavaRayError):
    """A request that is answered with an error envelope."""

    status = 500
    code: str | None = "internal_error"
    retry = False
    """Whether the same request may succeed later; the `x-should-retry` header."""
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """Return the body that OpenAI clients parse."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def plain(self) -> list[Any]:
        """Return what `from_plain` reads, as JSON has it."""
        return [type(self).__name__, self.message, self.param, self.code]

    def headers(self) -> dict[str, str]:
        """Return the headers that say to a client whether and when to try again."""
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers


class BadRequest(ApiError):
    """The request itself is wrong."""

    status = 400
    code = None


class NotAuthenticated(ApiError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ApiError):
    """A browser page of another origin, or a host name that is not this server's."""

    status = 403
    code = "forbidden"


class NotFound(ApiError):
    """No such route or model."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ApiError):
    """The route exists, for another method."""

    status = 405
    code = "method_not_allowed"


class TooLarge(ApiError):
    """A body, an image or its pixels exceed the limit."""

    status = 413
    code = "request_too_large"

    def headers(self) -> dict[str, str]:
        """Hang up too: the rest of the body is not wanted."""
        return super().headers() | {"connection": "close"}


class SlowBody(ApiError):
    """The body comes too slowly."""

    status = 408
    code = "request_timeout"
    retry = True


class UnsupportedMedia(ApiError):
    """The body is not JSON."""

    status = 415
    code = "unsupported_media_type"


class Overloaded(ApiError):
    """The queue is full."""

    status = 429
    code = "queue_full"
    retry = True
    retry_after_s = 1


class Unavailable(ApiError):
    """No engine can take the request now, or the one that had it is lost."""

    status = 503
    code = "engine_unavailable"
    retry = True
    retry_after_s = 2


class DeadlineExceeded(ApiError):
    """The answer took longer than the request may."""

    status = 504
    code = "deadline_exceeded"


def from_plain(plain: list[Any]) -> ApiError:
    """Return the error whose `plain` this is."""
    name, message, param, code = plain
    classes: list[type[ApiError]] = [ApiError, *ApiError.__subclasses__()]
    known = {each.__name__: each for each in classes}
    return known[name](message, param, code)
