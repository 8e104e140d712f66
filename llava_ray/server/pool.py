"""Which replica an ingress asks: the least busy one; requests wait in order where all are busy."""

import asyncio
import hmac
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress

from llava_ray.inference.engine import Prompt
from llava_ray.inference.request_errors import Overloaded, Unavailable
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk, Item, chunks_from
from llava_ray.server.channel import LARGEST_LINE, Address, Line, notice_silence, read_messages

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
"""Replicas that a request which has not begun is offered to."""
_SECRET_BYTES = 32
_SECRET_TIMEOUT_S = 10


class Pool:
    """The replicas of one model that have joined this ingress."""

    def __init__(self, variant_uri: str, *, slots: int, max_waiting: int) -> None:
        self._variant_uri = variant_uri
        self._slots = slots
        self._max_waiting = max_waiting
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._lines: dict[Line, asyncio.StreamWriter] = {}
        self._waiting: deque[asyncio.Future[Line]] = deque()

    async def open(self, host: str) -> Address:
        """Listen on a free port of one of this machine's addresses."""
        self._server = await asyncio.start_server(self._accept, host, 0, limit=LARGEST_LINE)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    def close(self) -> None:
        """Stop listening and hang up."""
        if self._server is not None:
            self._server.close()
        for writer in self._lines.values():
            writer.close()

    @property
    def empty(self) -> bool:
        """Whether no replica has joined that takes requests."""
        return all(line.leaving for line in self._lines)

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica."""
        return len(self._waiting)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; leaving the iteration stops the engine.

        A replica lost before the first token is replaced by another. Raises Overloaded when the
        queue is full, and what the engine raises.
        """
        deadline = time.monotonic() + timeout_s
        lost: list[Line] = []
        while True:
            line = await self._take(lost)
            begun = False
            try:
                chunks = _chunks(line, prompt, sampling, deadline - time.monotonic())
                async with aclosing(chunks):
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except Unavailable as error:
                lost.append(line)
                if begun or len(lost) == _ATTEMPTS:
                    raise
                logger.warning("a replica was lost, the request goes to another: %s", error)
            finally:
                self._give_back(line)

    async def _take(self, lost: Collection[Line]) -> Line:
        line = None if self._waiting else self._choose(lost)
        if line is not None:
            line.busy += 1
            return line
        # What was let in once is not refused when its replica is lost.
        if not lost and len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already: try again later")
        turn: asyncio.Future[Line] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)

    def _give_back(self, line: Line) -> None:
        line.busy -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and (line := self._choose(())) is not None:
            turn = self._waiting.popleft()
            if not turn.done():
                line.busy += 1
                turn.set_result(line)

    def _choose(self, lost: Collection[Line]) -> Line | None:
        """Return the least busy line with a free slot; another variant's only if all are."""
        joined = [line for line in self._lines if not line.leaving]
        ours = [line for line in joined if line.variant_uri == self._variant_uri]
        free = [line for line in ours or joined if line.busy < self._slots]
        return min(free, key=lambda line: (line in lost, line.busy), default=None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECRET_TIMEOUT_S):
                secret = await reader.readexactly(len(self._secret))
                if not hmac.compare_digest(secret, self._secret.encode()):
                    return
                line = Line(writer, await anext(read_messages(reader)))
            notice_silence(writer)
            self._lines[line] = writer
            self._hand_out()
            try:
                await line.listen(reader)
            finally:
                del self._lines[line]
        except (OSError, EOFError, TimeoutError, StopAsyncIteration):
            # The requests that it had know.
            pass
        finally:
            writer.close()


async def _chunks(
    line: Line, prompt: Prompt, sampling: SamplingParams, timeout_s: float
) -> AsyncGenerator[Chunk, None]:
    """Yield an answer's tokens from one replica."""
    inbox: asyncio.Queue[Item] = asyncio.Queue()
    number = line.ask(prompt, sampling, timeout_s, inbox.put_nowait)
    try:
        async with aclosing(chunks_from(inbox)) as chunks:
            async for chunk in chunks:
                yield chunk
    finally:
        line.forget(number)
