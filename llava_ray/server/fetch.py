"""Fetch an image from an allowed host without being led into the network behind this server.

A host is resolved once, every address must be public, and the connection goes to that address:
a name that changes its answer in between (DNS rebinding) gains nothing. Redirects are checked anew.
"""

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from llava_ray.inference.request_errors import BadRequest, TooLarge

MAX_REDIRECTS = 3
_PORTS = {"https": 443, "http": 80}
_BLOCK = 65536

Resolve = Callable[[str, int], str]
"""Returns the address to connect to, or raises BadRequest."""


def resolve_public(host: str, port: int) -> str:
    """Resolve a host to an address on the public internet.

    Raises BadRequest when it has none, or when any of its addresses is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refuse(f"image host {host!r} does not resolve") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refuse(f"image host {host!r} is not on the public internet")
    return addresses[0]


def is_public(address: str) -> bool:
    """Say whether an address is a public unicast one, looking into those that wrap IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        teredo = parsed.teredo
        inner = parsed.ipv4_mapped or parsed.sixtofour or (teredo[1] if teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast


@dataclass(frozen=True)
class ImageFetcher:
    """Fetch images from an allowlist of hosts."""

    hosts: Sequence[str]
    """Host names, with `:port` where it is not the scheme's own."""
    max_bytes: int
    timeout_s: float = 10
    resolve: Resolve = field(default=resolve_public)

    async def __call__(self, url: str) -> bytes:
        """Return what the URL holds.

        Raises BadRequest for a URL that is not allowed or not answered, TooLarge beyond the limit.
        """
        return await asyncio.to_thread(self.fetch, url)

    def fetch(self, url: str) -> bytes:
        """Do the same, blocking."""
        deadline = time.monotonic() + self.timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._check(url)
            try:
                answer = self._get(parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _refuse(f"image host {parts.hostname!r} gave no image: {error}") from error
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _refuse(f"an image's URL was redirected more than {MAX_REDIRECTS} times")

    def _check(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _refuse("an image's URL is broken") from error
        if parts.scheme not in _PORTS or not parts.hostname:
            raise _refuse("images come as data URLs (data:image/jpeg;base64,...)")
        if any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
            raise _refuse("an image's URL holds letters that must be percent-encoded")
        own = port is None or port == _PORTS[parts.scheme]
        name = parts.hostname if own else f"{parts.hostname}:{port}"
        if parts.username is not None or name not in self.hosts:
            raise _refuse(f"images from {parts.hostname!r} are not allowed here: send a data URL")
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """Return the body, or where the host redirects to."""
        assert parts.hostname is not None
        port = parts.port or _PORTS[parts.scheme]
        connection = _Pinned(
            parts.hostname,
            port,
            address=self.resolve(parts.hostname, port),
            tls=parts.scheme == "https",
            timeout=_left(deadline),
        )
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*"})
            # The connection forgets its socket once a last response is being read.
            plain = connection.sock
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return response.getheader("Location") or ""
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            return self._read(plain, response, deadline)
        finally:
            connection.close()

    def _read(
        self, plain: socket.socket, response: http.client.HTTPResponse, deadline: float
    ) -> bytes:
        body = bytearray()
        while True:
            # A host that drips bytes is cut off by the whole fetch's deadline.
            plain.settimeout(_left(deadline))
            block = response.read1(_BLOCK)
            if not block:
                return bytes(body)
            body += block
            if len(body) > self.max_bytes:
                raise TooLarge(f"an image has more than {self.max_bytes} bytes", "messages")


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever the host's name would resolve to by now."""

    def __init__(self, host: str, port: int, *, address: str, tls: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address = address
        self._tls = ssl.create_default_context() if tls else None

    def connect(self) -> None:
        """Connect to the pinned address; TLS still checks the name."""
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = (
            plain if self._tls is None else self._tls.wrap_socket(plain, server_hostname=self.host)
        )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _refuse(message: str) -> BadRequest:
    return BadRequest(message, "messages", "invalid_image_url")
