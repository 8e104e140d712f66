"""Who may ask: an API key on every route, or, bound to loopback, only programs of this machine.

Without a key a page in a local browser must not reach the endpoint either: the Host header has to
name this machine (against DNS rebinding) and an Origin has to be the endpoint's own.
"""

import hashlib
import hmac
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.inference.request_errors import ApiError, Forbidden, NotAuthenticated
from llava_ray.server.settings import is_loopback

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def key_digest(key: str) -> str:
    """Return what the server keeps of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """ASGI middleware that answers for everyone who may not ask."""

    def __init__(self, app: ASGIApp, *, key_digests: Sequence[str]) -> None:
        self._app = app
        self._key_digests = tuple(key_digests)
        """None means: this machine's programs only."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            headers = error.headers()
            if isinstance(error, NotAuthenticated):
                # Basic makes a browser ask for the key, which it then sends with the page's calls.
                scheme = "Basic" if scope.get("path") == "/" else "Bearer"
                headers["www-authenticate"] = f'{scheme} realm="llava_ray"'
            refusal = JSONResponse(error.envelope(), error.status, headers)
            await refusal(scope, receive, _with_headers(send))
            return
        await self._app(scope, receive, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        if scope["type"] != "http":
            raise Forbidden("only HTTP is served here")
        headers = Headers(scope=scope)
        if self._key_digests:
            scheme, key = _credentials(headers.get("authorization", ""))
            # All are compared, each in constant time, so that timing shows nothing of the key.
            known = [hmac.compare_digest(key_digest(key), d) for d in self._key_digests]
            if not scheme or not any(known):
                raise NotAuthenticated("the API key is missing or wrong: send it as Bearer token")
            if scheme == "basic":
                _check_origin(headers)
            return
        client = scope.get("client")
        if client is not None and not is_loopback(str(client[0])):
            raise Forbidden("without an API key only this machine may ask")
        if not is_loopback(_host_name(headers.get("host", ""))):
            raise Forbidden(f"host {headers.get('host', '')!r} is not this machine")
        _check_origin(headers)


def _credentials(header: str) -> tuple[str, str]:
    """Return the scheme and the key of an Authorization header; empty where there is none."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return "bearer", value.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return "basic", b64decode(value, validate=True).decode().partition(":")[2]
    return "", ""


def _check_origin(headers: Headers) -> None:
    """Refuse what a browser sends on behalf of another site's page."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None and _netloc(origin) != headers.get("host", "").lower():
        raise Forbidden(f"pages of {origin[:100]!r} may not ask")
    if site is not None and site not in ("same-origin", "none"):
        raise Forbidden("pages of other sites may not ask")


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.partition(":")[0]


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *_ALWAYS]
        await send(message)

    return sending
