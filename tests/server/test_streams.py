"""What a client sends and when."""

import asyncio

import pytest

from llava_ray.inference.request_errors import SlowBody
from llava_ray.server import streams


def test_a_body_that_hardly_comes_gives_its_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BODY_S", 0.2)

    async def dripping() -> dict[str, object]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(SlowBody, match="bytes of the body within 0 s"):
        asyncio.run(streams.read_body(dripping, limit=1000))
