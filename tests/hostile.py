"""Bodies of requests, and images that are not what they say."""

import base64
import io
import json
import random
import struct
import zlib

from PIL import Image

_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 2**70, -1e308, "", "x" * 5000, "\ud800", "\0", [], [[]], {}, {"a": {}},
    [None] * 100, "<image>" * 50, "data:image/png;base64,", "{{7*7}}", "../../etc/passwd",
)  # fmt: skip
_FIELDS = (
    "model", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream",
    "stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "response_format", "zzz",
)  # fmt: skip


def chat_body(url: str | None = None, text: str = "hi", **fields: object) -> dict[str, object]:
    content: list[dict[str, object]] = [{"type": "text", "text": text}]
    if url is not None:
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {
        "model": "tiny",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    zeros = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    )


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def one_of_each(rng: random.Random, model: str) -> list[bytes]:
    """Return 60 hostile bodies: a wrong value somewhere, too much, a broken image, broken JSON."""
    images = [_image(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
    plain = chat_body(url_of(images[0]), model=model)
    (message,) = plain["messages"]
    bodies = [plain | {field: rng.choice(_VALUES)} for field in _FIELDS]
    bodies += [plain | {rng.choice(_FIELDS): value} for value in _VALUES]
    bodies += [
        plain | {"messages": [message | {field: rng.choice(_VALUES)}]}
        for field in ("role", "content", "name", "x")
    ]
    bodies += [chat_body(url_of(_broken(rng, image)), model=model) for image in images]
    sides = [rng.choice((0, 1, 2**15, 2**31 - 1, rng.randrange(1, 2**20))) for _ in range(2)]
    bodies += [
        chat_body(url_of(png_header(*sides)), model=model),
        chat_body(url_of(rng.randbytes(rng.choice((1, 5_000, 400_000)))), model=model),
        chat_body(text="<image>" * rng.randint(600, 60_000), model=model),
        plain | {"messages": [message | {"content": message["content"] * rng.randint(2, 50)}]},
        plain | {"messages": [message] * rng.randint(65, 500)},
        plain | {"max_tokens": rng.randint(65, 2**40)},
        plain | {"stop": ["x" * rng.randint(1, 9)] * rng.randint(5, 5000)},
    ]
    texts = [json.dumps(body).encode() for body in bodies]
    depth = rng.choice((10, 1000, 20_000))
    texts += [b"[" * depth, b'{"a":' * depth, b"", b"null", b"1e999", b"\xff\xfe"]
    return texts + [_broken(rng, json.dumps(plain).encode(), whole=True) for _ in range(3)]


def _broken(rng: random.Random, data: bytes, *, whole: bool = False) -> bytes:
    """Return data with some bytes changed, and not all of it."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 30)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed if whole else changed[: rng.randint(1, len(changed))])


def _image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 24), 80).convert("RGB").save(stream, kind)
    return stream.getvalue()
