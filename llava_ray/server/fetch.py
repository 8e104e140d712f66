"""Fetch an image from an allowed host without being led into the network behind this server.

Every address of a host must be public, and the connection goes to one of those that were checked:
a name that changes its answer in between (DNS rebinding) gains nothing. Redirects are checked anew.
"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from llava_ray.inference.request_errors import BadRequest, TooLarge

MAX_REDIRECTS = 3
_PORTS = {"https": 443, "http": 80}
_BLOCK = 65536


class PublicResolver(aiohttp.ThreadedResolver):
    """Resolves the names of hosts on the public internet alone."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return a host's addresses.

        Raises OSError when any of them is not public.
        """
        found = await super().resolve(host, port, family)
        if not all(is_public(each["host"]) for each in found):
            raise OSError(errno.EACCES, "it is not on the public internet")
        return found


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
    resolver: type[AbstractResolver] = field(default=PublicResolver)

    async def __call__(self, url: str) -> bytes:
        """Return what the URL holds.

        Raises BadRequest for a URL that is not allowed or not answered, TooLarge beyond the limit.
        """
        connector = aiohttp.TCPConnector(resolver=self.resolver())
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                aiohttp.ClientSession(connector=connector) as session,
            ):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._get(session, url)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(url, answer)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            host = urlsplit(url).hostname
            raise _refuse(
                f"image host {host!r} gave no image: {str(error) or 'timed out'}"
            ) from error
        raise _refuse(f"an image's URL was redirected more than {MAX_REDIRECTS} times")

    async def _get(self, session: aiohttp.ClientSession, url: str) -> bytes | str:
        """Return the body, or where the host redirects to."""
        self._check(url)
        headers = {"Accept": "image/*"}
        async with session.get(
            URL(url, encoded=True), headers=headers, allow_redirects=False
        ) as response:
            if response.status in (301, 302, 303, 307, 308):
                return response.headers.get("Location", "")
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            body = bytearray()
            async for block in response.content.iter_chunked(_BLOCK):
                body += block
                if len(body) > self.max_bytes:
                    raise TooLarge(f"an image has more than {self.max_bytes} bytes", "messages")
            return bytes(body)

    def _check(self, url: str) -> None:
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
        # An address is never resolved; what is none is left to the resolver.
        with suppress(ValueError):
            if not is_public(parts.hostname):
                raise _refuse(f"image host {parts.hostname!r} is not on the public internet")


def _refuse(message: str) -> BadRequest:
    return BadRequest(message, "messages", "invalid_image_url")
