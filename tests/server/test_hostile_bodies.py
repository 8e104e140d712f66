"""A thousand bodies that were changed at random: refused each, and nothing is left of them."""

import ctypes
import gc
import io
import json
import random

import httpx
import psutil
from hostile import chat_body, png_header, url_of
from PIL import Image
from table_engine import TableEngine
from web_server import data_url, serving

_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 2**70, -1e308, "", "x" * 5000, "\ud800", "\0", [], [[]], {}, {"a": {}},
    [None] * 100, "<image>" * 50, "data:image/png;base64,", "{{7*7}}", "../../etc/passwd",
)  # fmt: skip


def _fuzzed(rng: random.Random, images: list[bytes]) -> bytes:
    """Return a hostile body: broken JSON, a wrong value somewhere, or a broken image."""
    kind = rng.randrange(6)
    if kind == 0:
        text = bytearray(json.dumps(chat_body(data_url())).encode())
        for _ in range(rng.randint(1, 8)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        return bytes(text)
    if kind == 1:
        depth = rng.choice((10, 1000, 20_000))
        return rng.choice((b"[" * depth, b'{"a":' * depth, b"", b"null", b"1e999", b"\xff\xfe"))
    if kind == 2:
        image = bytearray(rng.choice(images))
        for _ in range(rng.randint(1, 30)):
            image[rng.randrange(len(image))] = rng.randrange(256)
        return json.dumps(chat_body(url_of(bytes(image[: rng.randint(1, len(image))])))).encode()
    if kind == 5:
        return json.dumps(_oversized(rng)).encode()
    body = chat_body(data_url(), **{rng.choice(_FIELDS): rng.choice(_VALUES)})
    if kind == 3:
        messages = body["messages"]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            messages[0][rng.choice(("role", "content", "name", "x"))] = rng.choice(_VALUES)
    return json.dumps(body).encode()


def _oversized(rng: random.Random) -> dict[str, object]:
    """Return a body in which one thing is too large or too many, or says that it is."""
    sides = [rng.choice((0, 1, 2**15, 2**31 - 1, rng.randrange(1, 2**20))) for _ in range(2)]
    few = chat_body(data_url())
    many = {"role": "user", "content": few["messages"][0]["content"] * rng.randint(2, 50)}
    return rng.choice(
        (
            chat_body(url_of(png_header(*sides))),
            chat_body(url_of(rng.randbytes(rng.choice((1, 5_000, 400_000))))),
            chat_body(text="<image>" * rng.randint(600, 60_000)),
            few | {"messages": [many]},
            few | {"messages": few["messages"] * rng.randint(65, 500)},
            few | {"max_tokens": rng.randint(65, 2**40)},
            few | {"stop": ["x" * rng.randint(1, 9)] * rng.randint(5, 5000)},
        )
    )


_FIELDS = (
    "model", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream",
    "stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "response_format", "zzz",
)  # fmt: skip


def _held_bytes() -> int:
    """Return the process's memory without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_a_thousand_hostile_bodies_never_break_the_server() -> None:
    rng = random.Random(0)
    images = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        stream = io.BytesIO()
        Image.effect_noise((32, 24), 80).convert("RGB").save(stream, kind)
        images.append(stream.getvalue())
    engine = TableEngine(context=4096)
    statuses: dict[int, int] = {}
    with (
        serving({"tiny": engine}) as running,
        httpx.Client(timeout=30, headers={"Content-Type": "application/json"}) as client,
    ):
        url = f"{running.url}/v1/chat/completions"

        def send(count: int) -> None:
            for _ in range(count):
                answer = client.post(url, content=_fuzzed(rng, images))
                assert answer.status_code < 500, answer.text
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"]

        send(300)
        before = _held_bytes()
        send(700)
        grown = _held_bytes() - before
        assert running.endpoint._under_way == 0
    assert engine.held == {}
    assert statuses[400] > 500, statuses
    assert grown < 20e6, f"{grown / 1e6:.1f} MB more than before"
