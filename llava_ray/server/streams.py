"""Asynchronous plumbing: choices side by side, a client that hangs up, server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_ray.inference.request_errors import ApiError, Overloaded, SlowBody, TooLarge

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BODY_S = 20
"""Until the first bytes of a body."""
_BODY_BYTES_PER_S = 20_000
"""A body that comes more slowly keeps its place from others."""


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of all streams with their stream's number, as they come.

    The first failure ends all; leaving the iteration leaves them all.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    inbox: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(i, s, inbox)) for i, s in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(inbox.put_nowait)
    try:
        left = len(tasks)
        while left:
            found = await inbox.get()
            if isinstance(found, asyncio.Task):
                found.result()
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncGenerator[T, None],
    inbox: "asyncio.Queue[tuple[int, T] | asyncio.Task[None]]",
) -> None:
    async with aclosing(stream) as items:
        async for item in items:
            inbox.put_nowait((index, item))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run work, or cancel it when the client hangs up.

    To be called once the request's body has been read. Raises ClientDisconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Bodies:
    """Requests' bodies on their way in, of a limited size each and together."""

    def __init__(self, limit: int, *, together: int) -> None:
        self._limit, self._together, self._bytes = limit, together, 0

    async def read(self, request: Request) -> bytes:
        """Read a body.

        Raises TooLarge as soon as it exceeds the limit, Overloaded where all do together, SlowBody
        where it hardly comes, ClientDisconnect when the client hangs up.
        """
        body, start = bytearray(), asyncio.get_running_loop().time()
        may_take_s: float = _BODY_S
        try:
            async with asyncio.timeout_at(start + may_take_s) as deadline:
                async for part in request.stream():
                    body += part
                    self._bytes += len(part)
                    if len(body) > self._limit:
                        raise TooLarge(f"the body has more than {self._limit} bytes")
                    if self._bytes > self._together:
                        raise Overloaded("many large requests are on their way in: try again later")
                    may_take_s = _BODY_S + len(body) / _BODY_BYTES_PER_S
                    deadline.reschedule(start + may_take_s)
            return bytes(body)
        except TimeoutError as error:
            took = f"{len(body)} bytes of the body within {may_take_s:.0f} s"
            raise SlowBody(took) from error
        finally:
            self._bytes -= len(body)


class EventStream(StreamingResponse):
    """Server-sent events; a failure in the middle becomes an event with OpenAI's error envelope."""

    def __init__(
        self,
        first: list[dict[str, Any]],
        rest: AsyncGenerator[list[dict[str, Any]], None],
        done: Callable[[], None],
        *,
        timeout_s: float,
    ) -> None:
        super().__init__(
            _encoded(first, rest),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )
        self._rest = rest
        self._done = done
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client hangs up."""
        try:
            # The engine keeps its own deadline; this one is for a client that does not read.
            async with asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)
        except (ClientDisconnect, TimeoutError, OSError):
            return
        finally:
            await self._rest.aclose()
            self._done()


async def _encoded(
    first: list[dict[str, Any]], rest: AsyncGenerator[list[dict[str, Any]], None]
) -> AsyncGenerator[bytes, None]:
    try:
        yield _events(first)
        async for group in rest:
            if group:
                yield _events(group)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _events([error.envelope()])
    except Exception:
        logger.exception("a stream failed")
        yield _events([ApiError("the server failed on this stream").envelope()])


def _events(items: Sequence[Mapping[str, Any]]) -> bytes:
    texts = (json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)
    return "".join(f"data: {text}\n\n" for text in texts).encode()
