"""A load generator that costs little: one thread, raw sockets, no JSON parsed while it measures.

Each client sends its next request when its last answer has ended (a closed loop), over one kept
connection.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

_TIMEOUT_S = 600
_END = b"0\r\n\r\n"
"""Of a chunked body."""


@dataclass(frozen=True)
class Timeline:
    """When one request was sent and when its tokens came; seconds of time.perf_counter."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def first_token_s(self) -> float:
        """From the request to its first token."""
        return self.first - self.sent

    @property
    def per_token_s(self) -> float:
        """Between two later tokens, on average; where they come in groups it stays a mean."""
        return (self.last - self.first) / (self.tokens - 1)


def drive(
    host: str, port: int, bodies: Sequence[bytes], *, clients: int, tokens: int
) -> list[Timeline]:
    """Send streaming chat requests from `clients` closed loops; return all timelines.

    The bodies are dealt out to the clients in turn; each asks for exactly `tokens` tokens and for
    the usage. Raises RuntimeError with the server's words when an answer is another.
    """
    return asyncio.run(_drive(host, port, bodies, clients, tokens))


async def _drive(
    host: str, port: int, bodies: Sequence[bytes], clients: int, tokens: int
) -> list[Timeline]:
    loops = (_client(host, port, bodies[i::clients], tokens) for i in range(clients))
    return [timeline for each in await asyncio.gather(*loops) for timeline in each]


async def _client(host: str, port: int, bodies: Sequence[bytes], tokens: int) -> list[Timeline]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        return [await _ask(reader, writer, f"{host}:{port}", body, tokens) for body in bodies]
    finally:
        writer.close()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    body: bytes,
    tokens: int,
) -> Timeline:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    text, first, last = b"", 0.0, 0.0
    sent = time.perf_counter()
    writer.write(head.encode() + body)
    async with asyncio.timeout(_TIMEOUT_S):
        while not text.endswith(_END):
            block = await reader.read(65536)
            if not block:
                break
            text += block
            last = time.perf_counter()
            # The first event, with the role, comes together with the first token.
            if not first and b'"delta"' in text:
                first = last
    if f'"completion_tokens":{tokens},'.encode() not in text or b'"error"' in text:
        raise RuntimeError(f"{host} gave no {tokens} tokens: {text[-600:]!r}")
    return Timeline(sent, first, last, tokens)
