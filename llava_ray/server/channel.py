"""Requests on their way to engine replicas and tokens on their way back, beside Ray.

A Serve call reaches an engine some 5 ms after it is made and costs the engine's process as much
Python; a token that is a Ray object costs another millisecond. The engine waits for both. Here a
request is one write to a socket, and so are one decode step's tokens of all answers. Serve starts,
watches, scales and replaces the replicas as ever.

An ingress listens, and each replica that Serve tells to join connects to it. Messages are lines of
JSON; a request's line is followed by the bytes of its images.
"""

import asyncio
import dataclasses
import itertools
import json
import math
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import FinishReason
from llava_ray.inference.request_errors import ApiError, Unavailable, from_plain
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Answer, Item, Scheduler

LARGEST_LINE = 2**26
_CONNECT_TIMEOUT_S = 5
_CLOSE_TIMEOUT_S = 5
_SILENCE_S = 10
"""After which a machine that has vanished counts as gone."""
_LOOK_EVERY_S = 0.05

Deliver = Callable[[Item], None]


@dataclass(frozen=True)
class Address:
    """Where an ingress listens, and what shows it that a replica was told so by it."""

    host: str
    port: int
    secret: str


class Line:
    """The ingress's end of the way to one replica."""

    def __init__(self, writer: asyncio.StreamWriter, variant_uri: str) -> None:
        self.variant_uri = variant_uri
        """What the replica serves; in an upgrade not all serve the same."""
        self.busy = 0
        """Answers that were promised to it; whoever owns the line counts."""
        self.leaving = False
        """Whether the replica only finishes what it has."""
        self._writer = writer
        self._numbers = itertools.count()
        self._answers: dict[int, Deliver] = {}

    def ask(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float, deliver: Deliver
    ) -> int:
        """Send a request and return its number; `deliver` gets its tokens, then how it ended."""
        number = next(self._numbers)
        self._answers[number] = deliver
        request = {
            "ask": number,
            "input_ids": prompt.input_ids,
            "images": [image.shape for image in prompt.images],
            "sampling": dataclasses.asdict(sampling),
            "timeout_s": timeout_s,
        }
        self._writer.write(b"".join([_encode(request), *(i.tobytes() for i in prompt.images)]))
        return number

    def forget(self, number: int) -> None:
        """Drop what still comes for a request; the replica stops unless it has ended."""
        if self._answers.pop(number, None) is not None and not self._writer.is_closing():
            self._writer.write(_encode({"cancel": number}))

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Deliver what comes until the replica hangs up; what has not ended then has failed."""
        try:
            async for message in read_messages(reader):
                if message == "leaving":
                    self.leaving = True
                    self._writer.write(_encode("left"))
                else:
                    for each in message:
                        self._deliver(*each)
        finally:
            self.leaving = True
            for deliver in self._answers.values():
                deliver(
                    Unavailable("the engine was lost before the answer ended", None, "engine_lost")
                )
            self._answers.clear()

    def _deliver(
        self, number: int, steps: list[Any], reason: FinishReason | None, error: list[Any] | None
    ) -> None:
        deliver = self._answers.get(number)
        if deliver is None:
            return
        if reason is not None or error is not None:
            del self._answers[number]
        for each in steps:
            deliver(_step(each))
        if reason is not None:
            deliver(reason)
        if error is not None:
            deliver(from_plain(error))


class Uplink:
    """A replica's end of the way to one ingress."""

    def __init__(self, scheduler: Scheduler, writer: asyncio.StreamWriter) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, list[Answer]] = {}
        """By number: the answer, once the scheduler has it; it may end on its thread before."""
        self._left = asyncio.Event()
        self._writer = writer
        # Tokens go out on the engine's thread: waking the loop would cost it more.
        self._direct: socket.socket | None = socket.socket(
            fileno=os.dup(writer.get_extra_info("socket").fileno())
        )
        self._sending = threading.Lock()

    @property
    def answers(self) -> int:
        """Requests that have not ended."""
        return len(self._answers)

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Take requests until the ingress hangs up; nobody waits for their answers then."""
        try:
            async for message in read_messages(reader):
                if message == "left":
                    self._left.set()
                elif "cancel" in message:
                    self._cancel(message["cancel"])
                else:
                    await self._submit(message, reader)
        except (OSError, EOFError):
            pass
        finally:
            self._left.set()
            for number in list(self._answers):
                self._cancel(number)
            self._close()

    async def leave(self) -> None:
        """Finish what the ingress has asked, once it knows that it is to ask no more."""
        self.send(_encode("leaving"))
        await self._left.wait()
        while self._answers:
            await asyncio.sleep(_LOOK_EVERY_S)
        self._close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass

    def send(self, data: bytes) -> None:
        """Send now what the socket takes, and leave the rest to the event loop."""
        with self._sending:
            if self._direct is not None:
                try:
                    data = data[self._direct.send(data) :]
                except BlockingIOError:
                    pass
                except OSError:
                    # The reading side notices too, and ends all.
                    return
                if not data:
                    return
                # From now on all goes the same way, so that the order is kept.
                self._direct.close()
                self._direct = None
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)

    def _close(self) -> None:
        with self._sending:
            if self._direct is not None:
                self._direct.close()
                self._direct = None
        self._loop.call_soon(self._writer.close)

    async def _submit(self, message: dict[str, Any], reader: asyncio.StreamReader) -> None:
        images = []
        for shape in message["images"]:
            # A bytearray, for torch wants memory that can be written.
            data = bytearray(await reader.readexactly(math.prod(shape)))
            images.append(np.frombuffer(data, np.uint8).reshape(shape))
        sampling = message["sampling"]
        sampling["stop"] = tuple(sampling["stop"])
        number = message["ask"]
        prompt = Prompt(tuple(message["input_ids"]), tuple(images))
        held = self._answers[number] = []
        try:
            held.append(
                self._scheduler.submit(
                    prompt,
                    SamplingParams(**sampling),
                    message["timeout_s"],
                    self._deliver,
                    number,
                )
            )
        except ApiError as error:
            self._deliver([(number, error)])

    def _cancel(self, number: int) -> None:
        for answer in self._answers.pop(number, ()):
            self._scheduler.cancel(answer)

    def _deliver(self, items: list[tuple[Any, Item]]) -> None:
        """Send one moment's tokens and ends of all answers; on the engine's thread."""
        parts: dict[int, list[Any]] = {}
        for number, item in items:
            part = parts.setdefault(number, [number, [], None, None])
            if isinstance(item, Step):
                part[1].append(_plain(item))
                continue
            self._answers.pop(number, None)
            if isinstance(item, ApiError):
                part[3] = item.plain()
            else:
                part[2] = item
        self.send(_encode(list(parts.values())))


class Uplinks:
    """A replica's connections, one per ingress."""

    def __init__(self, scheduler: Scheduler, variant_uri: str) -> None:
        self._scheduler = scheduler
        self._variant_uri = variant_uri
        self._open: dict[Address, tuple[Uplink, asyncio.Task[None]]] = {}
        self._joining = asyncio.Lock()
        self._leaving = False

    @property
    def answers(self) -> int:
        """Requests of all ingresses that have not ended."""
        return sum(uplink.answers for uplink, _ in self._open.values())

    async def join(self, address: Address) -> None:
        """Connect to an ingress unless that is done.

        Raises Unavailable when it cannot be reached.
        """
        async with self._joining:
            self._open = {at: found for at, found in self._open.items() if not found[1].done()}
            if self._leaving or address in self._open:
                return
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(
                        address.host, address.port, limit=LARGEST_LINE
                    )
            except OSError as error:
                raise Unavailable(f"the ingress at {address.host} cannot be reached") from error
            notice_silence(writer)
            uplink = Uplink(self._scheduler, writer)
            uplink.send(address.secret.encode() + _encode(self._variant_uri))
            self._open[address] = (uplink, asyncio.create_task(uplink.listen(reader)))

    async def leave(self) -> None:
        """Finish all answers and hang up; no ingress sends more."""
        async with self._joining:
            self._leaving = True
        await asyncio.gather(*(uplink.leave() for uplink, _ in self._open.values()))
        await asyncio.gather(*(task for _, task in self._open.values()))


def notice_silence(writer: asyncio.StreamWriter) -> None:
    """End the connection when the other machine vanishes without hanging up."""
    end = writer.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not all systems have these; theirs then wait for minutes.
    for name, value in (
        ("TCP_KEEPIDLE", _SILENCE_S // 2),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", _SILENCE_S // 2),
        ("TCP_USER_TIMEOUT", _SILENCE_S * 1000),
    ):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def read_messages(reader: asyncio.StreamReader) -> AsyncGenerator[Any, None]:
    """Yield each line's content until the other side hangs up, be it in the middle of a line."""
    while (text := await reader.readline()).endswith(b"\n"):
        yield json.loads(text)


def _encode(message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _plain(step: Step) -> list[Any]:
    if step.logprob is None:
        return [step.token_id]
    return [step.token_id, step.logprob, step.top_logprobs]


def _step(plain: list[Any]) -> Step:
    if len(plain) == 1:
        return Step(plain[0])
    token, logprob, top = plain
    return Step(token, logprob, tuple((rival, value) for rival, value in top))
