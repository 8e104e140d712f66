"""What serving costs over its scheduler and engine alone, at 1, 8 and 64 clients.

Both get the same prompts, so what is added is the cost of HTTP, Ray and the channel. Each has a
process of its own: the embedded model on one CPU thread each, or a given variant on a GPU. They
take turns, so that a machine that slows down does so for both; each round gives a difference, and
the medians of those count.
"""

import asyncio
import json
import logging
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, get_args

import aiohttp
import numpy as np
import ray
import torch
from PIL import Image, ImageDraw
from ray import serve

from llava_ray import __version__
from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import ArtifactStore, read_record
from llava_ray.bench import results
from llava_ray.bench.compare import base_variant
from llava_ray.bench.model import write_model
from llava_ray.config.run import ServeConfig
from llava_ray.deploy import proxy
from llava_ray.inference.engine import Prompt
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Item, Scheduler
from llava_ray.models.images import jpeg_url
from llava_ray.resources.devices import device_name
from llava_ray.server.application import build
from llava_ray.server.loading import open_variant
from llava_ray.server.settings import AppArgs, ModelArgs

logger = logging.getLogger(__name__)

Proxy = Literal["python", "haproxy"]

_QUESTION = "What does the sign say?"
_TOKENS = 64
"""Per answer."""
_LOADS = {1: (9, 8), 8: (9, 24), 64: (5, 128)}
"""By clients: rounds, and requests of each; short rounds are noisy."""
_TIMEOUT_S = 600.0
_SLOTS = max(_LOADS)


class Timeline(NamedTuple):
    """When one request was sent and when its tokens came; seconds of time.perf_counter."""

    sent: float
    first: float
    last: float
    tokens: int


def run(
    out: Path,
    *,
    variant_uri: str | None = None,
    shapes_7b: str | None = None,
    port: int = 8731,
    rounds: int | None = None,
) -> None:
    """Measure and write the result as JSON. Starts and ends a Ray of its own.

    Served is a variant, or LLaVA-1.5-7B's shapes with random weights as the slug `shapes_7b`; their
    engines share GPUs. Without either the embedded model is served on the CPU: the served engine
    and the bare one get one CPU thread each, and only one of them works at a time; the replica's
    HTTP, Serve's proxy and the load generator share what other CPUs there are.
    """
    gpus = min(1.0, torch.cuda.device_count() / 2) if variant_uri or shapes_7b else 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(folder)
        if shapes_7b:
            base = write_model(Path(folder, "base"), "cuda")
            variant_uri = base_variant(store, shapes_7b, base, "cuda").uri
        uri = variant_uri or base_variant(store, "none-fp32").uri
        slug = read_record(Variant, uri).slug
        loads = {
            f"Ray Serve, {kind} proxy": _behind(kind, uri, gpus, port, rounds)
            for kind in get_args(Proxy)
        }
    about = {
        "device": f"{device_name('cuda' if gpus else 'cpu')}, {os.cpu_count()} CPUs",
        "variant": slug,
        "code_version": __version__,
        "tokens_per_answer": _TOKENS,
    }
    results.write(out, "serving", {**about, "ways": loads})


def _behind(kind: Proxy, uri: str, gpus: float, port: int, rounds: int | None) -> dict[str, Any]:
    """Measure behind one of Serve's proxies; both engines open the variant, with `gpus` each."""
    args = AppArgs(
        models=(ModelArgs(variant_uri=uri, name="bench"),),
        gpus_per_replica=gpus,
        host="127.0.0.1",
        context=768 if gpus else 512,
        max_concurrent_requests=_SLOTS,
        # Each request is another image's; a prefix kept for one would help neither side.
        kept_prefixes=0,
    )
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        bare = ray.remote(num_cpus=1, num_gpus=gpus)(BareEngine).remote(args)
        proxy.start(ServeConfig(host=args.host, port=port, proxy=kind))
        serve.run(build(args), name="bench", route_prefix="/")
        return _measure(bare, f"http://{args.host}:{port}", rounds)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


class BareEngine:
    """The served scheduler and its engine, in a process of their own: no HTTP, no text."""

    def __init__(self, args: AppArgs) -> None:
        self._engine = open_variant(args.engine_args(args.models[0], "bare", _SLOTS))
        self._scheduler = Scheduler(self._engine)
        self._scheduler.start()

    def load(self, count: int, clients: int) -> list[Timeline]:
        """Answer `count` prompts from `clients` closed loops."""
        prompts = [make_prompt(self._engine, _QUESTION, [_image(i)]) for i in range(count)]
        return closed_loop(self._scheduler, prompts, clients=clients, tokens=_TOKENS)


def closed_loop(
    scheduler: Scheduler, prompts: Sequence[Prompt], *, clients: int, tokens: int
) -> list[Timeline]:
    """Give each client its next prompt once its last answer has ended; greedy."""
    inbox: SimpleQueue[tuple[float, list[tuple[Hashable, Item]]]] = SimpleQueue()
    left: dict[Hashable, deque[Prompt]] = {i: deque(prompts[i::clients]) for i in range(clients)}
    times: dict[Hashable, list[float]] = {}
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    def outlet(items: list[tuple[Hashable, Item]]) -> None:
        inbox.put((time.perf_counter(), items))

    def ask(client: Hashable) -> None:
        if left[client]:
            times[client] = [time.perf_counter()]
            scheduler.submit(left[client].popleft(), sampling, outlet, client)

    for client in left:
        ask(client)
    done: list[Timeline] = []
    while len(done) < len(prompts):
        now, items = inbox.get()
        for client, item in items:
            if isinstance(item, ApiError):
                raise item
            if isinstance(item, Step):
                times[client].append(now)
                continue
            sent, first, *_, last = times[client]
            done.append(Timeline(sent, first, last, len(times[client]) - 1))
            ask(client)
    return done


def drive(url: str, bodies: Sequence[bytes], *, clients: int, tokens: int) -> list[Timeline]:
    """Send streaming chat requests from `clients` closed loops; return all timelines.

    It costs little: one thread, and no JSON parsed while it measures. The bodies are dealt out to
    the clients in turn; each asks for exactly `tokens` tokens and for the usage. Raises
    RuntimeError with the server's words when an answer is another.
    """

    async def client(session: aiohttp.ClientSession, own: Sequence[bytes]) -> list[Timeline]:
        return [await _ask(session, f"{url}/v1/chat/completions", body, tokens) for body in own]

    async def load() -> list[Timeline]:
        connector = aiohttp.TCPConnector(limit=clients)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            loops = [client(session, bodies[i::clients]) for i in range(clients)]
            return [timeline for each in await asyncio.gather(*loops) for timeline in each]

    return asyncio.run(load())


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, tokens: int) -> Timeline:
    text, first, last = b"", 0.0, 0.0
    sent = time.perf_counter()
    headers = {"content-type": "application/json"}
    async with session.post(url, data=body, headers=headers) as response:
        async for block in response.content.iter_any():
            text += block
            last = time.perf_counter()
            # The first event, with the role, comes together with the first token.
            if not first and b'"delta"' in text:
                first = last
    if f'"completion_tokens":{tokens},'.encode() not in text or b'"error"' in text:
        raise RuntimeError(f"{url} gave no {tokens} tokens: {text[-600:]!r}")
    return Timeline(sent, first, last, tokens)


def _image(index: int) -> Image.Image:
    """Draw a sign; each index gives other pixels."""
    image = Image.new("RGB", (336, 336), (index % 256, index * 7 % 256, 90))
    ImageDraw.Draw(image).text((40, 150), f"GATE {index}", fill="white", font_size=60)
    return image


def _body(index: int) -> bytes:
    image = {"type": "image_url", "image_url": {"url": jpeg_url(_image(index), quality=90)}}
    content = [image, {"type": "text", "text": _QUESTION}]
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def _measure(bare: Any, url: str, rounds: int | None) -> dict[str, Any]:
    bodies = [_body(i) for i in range(max(count for _, count in _LOADS.values()))]
    drive(url, bodies[:2], clients=2, tokens=_TOKENS)
    ray.get(bare.load.remote(2, 2))
    loads: dict[str, Any] = {}
    for clients, (usual, count) in _LOADS.items():
        repeats = rounds or usual
        sides: dict[str, list[list[Timeline]]] = {"bare": [], "served": []}
        for number in range(repeats):
            # Who goes first changes, so that neither profits from a machine that slows down.
            for side in ("bare", "served") if number % 2 else ("served", "bare"):
                if side == "bare":
                    done = ray.get(bare.load.remote(count, clients))
                else:
                    done = drive(url, bodies[:count], clients=clients, tokens=_TOKENS)
                sides[side].append(done)
        found = {"rounds": repeats, "requests_per_round": count}
        loads[str(clients)] = compare(sides["bare"], sides["served"]) | found
        logger.info("%d clients: %s", clients, json.dumps(loads[str(clients)]))
    return loads


def compare(
    bare: Sequence[Sequence[Timeline]], served: Sequence[Sequence[Timeline]]
) -> dict[str, Any]:
    """Return percentiles of both sides' requests, and medians over the rounds of what is added."""
    rounds = zip(served, bare, strict=True)
    pairs = [(summarize([ours]), summarize([theirs])) for ours, theirs in rounds]

    def added_ms(key: str) -> float:
        return statistics.median(ours[key] - theirs[key] for ours, theirs in pairs)

    shares = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    return {
        "added_first_token_ms": added_ms("first_token_p50_ms"),
        "added_per_token_ms": added_ms("per_token_p50_ms"),
        "throughput_share": statistics.median(shares),
        "bare": summarize(bare),
        "served": summarize(served),
    }


def summarize(rounds: Sequence[Sequence[Timeline]]) -> dict[str, float]:
    """Return percentiles over the requests of all rounds, and the median round's tokens/s."""
    requests = [timeline for each in rounds for timeline in each]
    first = [1000 * (t.first - t.sent) for t in requests]
    # Of each request the mean, as its later tokens may come in groups.
    later = [1000 * (t.last - t.first) / (t.tokens - 1) for t in requests]
    rates = [
        sum(t.tokens for t in each) / (max(t.last for t in each) - min(t.sent for t in each))
        for each in rounds
    ]
    return {
        "first_token_p50_ms": statistics.median(first),
        "first_token_p99_ms": float(np.percentile(first, 99)),
        "per_token_p50_ms": statistics.median(later),
        "per_token_p99_ms": float(np.percentile(later, 99)),
        "tokens_per_s": statistics.median(rates),
    }
