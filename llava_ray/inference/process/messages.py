"""What passes between an engine's process and the one that started it.

They share a socket pair, so nothing listens and nothing leaves the machine. A message is its
length in 4 bytes, big endian, and MessagePack. The engine sends Opened, or Refused and ends; from
then on Tokens whenever some have come, and a Beat twice a second. It is sent Ask and Cancel.
"""

import asyncio
import socket
from typing import Any

import msgspec

from llava_ray.inference.generate import FinishReason
from llava_ray.inference.sampling import SamplingParams, Step

_LENGTH_BYTES = 4


class Picture(msgspec.Struct, array_like=True):
    """An `ImagePixels`."""

    tiles: bytearray
    """uint8 [tiles, image_size, image_size, 3]; bytearray, since torch wants writable memory."""
    num_tokens: int
    size: tuple[int, int]


class Ask(msgspec.Struct, tag=True):
    """Answer a prompt."""

    number: int
    """What the answer is called from then on."""
    input_ids: tuple[int, ...]
    images: list[Picture]
    sampling: SamplingParams


class Cancel(msgspec.Struct, tag=True):
    """Stop an answer."""

    number: int


class Opened(msgspec.Struct, tag=True):
    """The engine is loaded; how it is, as `Engine` has it."""

    eos_token_id: int
    context: int
    slots: int


class Refused(msgspec.Struct, tag=True):
    """The engine cannot be loaded."""

    reason: str


class Part(msgspec.Struct, array_like=True):
    """One answer's share of a moment: tokens, then perhaps how it ended."""

    number: int
    steps: list[Step]
    finish_reason: FinishReason | None = None
    error: list[str | None] | None = None
    """As `ApiError.plain` has it."""


class Tokens(msgspec.Struct, tag=True):
    """What one moment brought to all answers."""

    parts: list[Part]


class Beat(msgspec.Struct, tag=True):
    """The process lives, and what it is at."""

    steps: int
    """Prefills and decode steps so far: one that hangs is seen by it."""
    waiting: int
    active: int
    resident_bytes: int
    device_bytes: int | None = None
    """None on a CPU."""


ToEngine = Ask | Cancel
FromEngine = Opened | Refused | Tokens | Beat

_encoder = msgspec.msgpack.Encoder()
_to_engine: "msgspec.msgpack.Decoder[ToEngine]" = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """Return a message as it is sent."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def receive(connection: socket.socket) -> ToEngine:
    """Wait for one of the messages to the engine.

    Raises EOFError when the other side has hung up.
    """
    length = int.from_bytes(_exactly(connection, _LENGTH_BYTES), "big")
    return _to_engine.decode(_exactly(connection, length))


async def read(reader: asyncio.StreamReader) -> Any:
    """Wait for one of the engine's messages.

    Raises EOFError when its process has ended.
    """
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    return _from_engine.decode(await reader.readexactly(length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise EOFError
    return data
