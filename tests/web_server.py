"""The endpoint under uvicorn, in a thread of the test's process, on a free port."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from local_engine import LocalEngine
from PIL import Image

from llava_ray.inference.engine import Engine
from llava_ray.server.backend import Backend
from llava_ray.server.endpoint import Endpoint
from llava_ray.server.guard import key_digest
from llava_ray.server.metrics import Recorder
from llava_ray.server.settings import AppArgs, ModelArgs


@dataclass(frozen=True)
class Running:
    url: str
    endpoint: Endpoint
    engines: tuple[LocalEngine, ...]


def backend_for(local: LocalEngine, name: str) -> Backend:
    engine = local.scheduler.engine
    return Backend(
        name=name,
        slug=name,
        digest="sha256:" + "0" * 64,
        created=0,
        eos_token_id=engine.eos_token_id,
        context=engine.context,
        slots=engine.slots,
        scorecard={"perplexity": 2.5},
        tokenizer=engine.tokenizer,
        family=engine.family,
        engine=local,
        recorder=Recorder(name),
    )


def app_args(names: Sequence[str] = ("tiny",), **changes: object) -> AppArgs:
    models = [ModelArgs(variant_uri="nowhere", name=name) for name in names]
    return AppArgs.model_validate({"models": models, "max_new_tokens": 64, **changes})


@contextmanager
def serving(
    engines: dict[str, Engine], *, key: str | None = None, **changes: object
) -> Iterator[Running]:
    """Serve engines until the block ends."""
    args = app_args(tuple(engines), **changes)
    local = tuple(map(LocalEngine, engines.values()))
    backends = list(map(backend_for, local, engines))
    endpoint = Endpoint(backends, args)
    app = endpoint.app([key_digest(key)] if key else [])
    # With the protocol named, asyncio turns Nagle's algorithm off on what is accepted.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    # Who comes before the server has started waits, and is not refused.
    listener.listen()
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_keep_alive=30)
    )

    async def main() -> None:
        for engine in local:
            engine.scheduler.start()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        port = listener.getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", endpoint, local)
    finally:
        for engine in local:
            engine.scheduler.close()
        server.should_exit = True
        thread.join(10)
        listener.close()


def data_url(image: Image.Image | None = None, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    (image or Image.new("RGB", (20, 10), "red")).save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
