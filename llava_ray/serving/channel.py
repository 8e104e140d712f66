"""Tokens on their way from engine replicas to the ingress, beside Ray rather than through it.

A token that is a Ray object costs the engine's process a millisecond of Python, which the engine
then waits for. Here one decode step's tokens of all answers are one write to one socket. The Serve
call that asked for an answer stays open meanwhile: routing, counting, failures and cancelling are
Serve's as ever.
"""

import asyncio
import hmac
import itertools
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_ray.serving.api_errors import Unavailable
from llava_ray.serving.generate import FinishReason
from llava_ray.serving.sampling import Step
from llava_ray.serving.scheduler import Chunk

_SECRET_BYTES = 32
_LARGEST_LINE = 2**26
_SECRET_TIMEOUT_S = 10


@dataclass(frozen=True)
class Address:
    """Where an ingress listens, and what shows it that a replica was told so by it."""

    host: str
    port: int
    secret: str


class Receiver:
    """The ingress's end; many replicas connect to it."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._numbers = itertools.count()
        self._expected: dict[int, Callable[[Chunk], None]] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, host: str) -> Address:
        """Listen on a free port of one of this machine's addresses."""
        self._server = await asyncio.start_server(self._read, host, 0, limit=_LARGEST_LINE)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    def close(self) -> None:
        """Stop listening and hang up."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    def expect(self, deliver: Callable[[Chunk], None]) -> int:
        """Return a number under which a replica may send chunks from now on."""
        number = next(self._numbers)
        self._expected[number] = deliver
        return number

    def forget(self, number: int) -> None:
        """Drop whatever still comes under a number."""
        self._expected.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            async with asyncio.timeout(_SECRET_TIMEOUT_S):
                secret = await reader.readexactly(len(self._secret))
            if not hmac.compare_digest(secret, self._secret.encode()):
                return
            while line := await reader.readline():
                for number, steps, reason in json.loads(line):
                    deliver = self._expected.get(number)
                    if deliver is not None:
                        deliver(Chunk(tuple(_step(each) for each in steps), reason))
        except (OSError, EOFError, TimeoutError):
            # The Serve calls of the answers that came this way fail too, and tell the clients.
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Sender:
    """A replica's end of the way to one ingress."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._outbox: dict[int, tuple[list[Any], FinishReason | None]] = {}

    @property
    def closed(self) -> bool:
        """Whether the ingress is gone."""
        return self._writer.is_closing()

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    def put(self, number: int, item: Step | FinishReason) -> None:
        """Send a token or an answer's end, together with all else that comes in this moment."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        steps, reason = self._outbox.get(number, ([], None))
        if isinstance(item, Step):
            steps.append(_plain(item))
        else:
            reason = item
        self._outbox[number] = (steps, reason)

    def _flush(self) -> None:
        parts = [(number, *rest) for number, rest in self._outbox.items()]
        self._outbox = {}
        if not self.closed:
            self._writer.write(json.dumps(parts, separators=(",", ":")).encode() + b"\n")


class Senders:
    """A replica's connections, one per ingress that asked it something."""

    def __init__(self) -> None:
        self._open: dict[Address, asyncio.Task[Sender]] = {}

    async def to(self, address: Address) -> Sender:
        """Return the connection to an ingress, made anew where there is none.

        Raises Unavailable when the ingress cannot be reached.
        """
        task = self._open.get(address)
        if task is None or (task.done() and (task.exception() or task.result().closed)):
            task = self._open[address] = asyncio.create_task(_connect(address))
        try:
            # A request that is cancelled must not take the others' connection with it.
            return await asyncio.shield(task)
        except OSError as error:
            raise Unavailable(f"the ingress at {address.host} cannot be reached") from error

    def close(self) -> None:
        """Hang up on all."""
        for task in self._open.values():
            if task.done() and task.exception() is None:
                task.result().close()


async def _connect(address: Address) -> Sender:
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(address.secret.encode())
    return Sender(writer)


def _plain(step: Step) -> list[Any]:
    if step.logprob is None:
        return [step.token_id]
    return [step.token_id, step.logprob, step.top_logprobs]


def _step(plain: list[Any]) -> Step:
    if len(plain) == 1:
        return Step(plain[0])
    token, logprob, top = plain
    return Step(token, logprob, tuple((rival, value) for rival, value in top))
