"""What a client sends and when."""

import asyncio
import contextlib

import pytest
from starlette.requests import Request
from starlette.types import Receive

from llava_ray.inference.request_errors import Overloaded, SlowBody, TooLarge
from llava_ray.server import streams


def _request(receive: Receive) -> Request:
    return Request({"type": "http"}, receive)


def test_a_body_that_hardly_comes_gives_its_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BODY_S", 0.2)

    async def dripping() -> dict[str, object]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with (
        contextlib.closing(asyncio.new_event_loop()) as loop,
        pytest.raises(SlowBody, match="bytes of the body within 0 s"),
    ):
        loop.run_until_complete(streams.Bodies(1000, together=1000).read(_request(dripping)))


def test_bodies_are_of_a_limited_size_each_and_together() -> None:
    async def arriving() -> dict[str, object]:
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        with pytest.raises(TooLarge):
            loop.run_until_complete(streams.Bodies(250, together=1000).read(_request(arriving)))
        bodies = streams.Bodies(1000, together=250)
        for _ in range(2):  # What was refused takes no room.
            with pytest.raises(Overloaded):
                loop.run_until_complete(bodies.read(_request(arriving)))
