"""What serving costs over its scheduler and engine alone, at 1, 8 and 64 clients.

Both get the same prompts, so what is added is the cost of HTTP, Ray and the channel. Each has a
process of its own: the embedded model on one CPU thread each, or a given variant on a GPU. They
take turns, so that a machine that slows down does so for both; each round gives a difference, and
the medians of those count.
"""

import base64
import io
import json
import logging
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from llava_ray import __version__
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench.load import Timeline, drive
from llava_ray.inference.engine import Prompt
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Item, Scheduler
from llava_ray.resources.devices import device_name

if TYPE_CHECKING:
    from PIL import Image

    from llava_ray.server.settings import AppArgs

logger = logging.getLogger(__name__)

CLIENTS = (1, 8, 64)
GOAL_FIRST_TOKEN_MS = 7.0
GOAL_PER_TOKEN_MS = 0.2
GOAL_THROUGHPUT_SHARE = 0.95

_SLUG = "none-fp32"
_QUESTION = "What does the sign say?"
_TOKENS = 64
"""Per answer."""
_ROUNDS = {1: 9, 8: 9, 64: 5}
"""By clients; short rounds are noisy."""
_REQUESTS = {1: 8, 8: 24, 64: 128}
"""Per round, by clients."""
_TIMEOUT_S = 600.0
_CONTEXT = {"cpu": 512, "cuda": 1024}
_SIDE = 336
"""Pixels on a side of the images that are sent: LLaVA-1.5's own."""
_SLOTS = max(CLIENTS)
_PROCESSES = {
    "bare_engine": "ray::BareEngine",
    "engine_replica": "ray::ServeReplica:bench:engine-0",
    "ingress_replica": "ray::ServeReplica:bench:ingress",
    "proxy": "/haproxy -db",
}
"""How Ray titles the processes whose CPU time is counted."""


def run(
    out: Path, *, variant_uri: str | None = None, port: int = 8731, rounds: int | None = None
) -> dict[str, Any]:
    """Measure, write the result as JSON and return it. Starts and ends a Ray of its own.

    Without a variant the embedded model is served on the CPU: the served engine and the bare one
    get one CPU thread each, and only one of them works at a time; the ingress, Serve's proxy and
    the load generator share what other CPUs there are. A variant's two engines share the GPUs.
    """
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(variant_uri or _make_variant(Path(folder)), _gpus() if variant_uri else 0.0)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        try:
            bare = ray.remote(num_cpus=1, num_gpus=scene.gpus)(BareEngine).remote(scene)
            host = _serve(scene, port)
            result = _measure(bare, host, port, rounds)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True)
class Scene:
    """What both engines open."""

    variant_uri: str
    gpus: float
    """Of each."""

    @property
    def args(self) -> "AppArgs":
        """The application's arguments."""
        from llava_ray.server.settings import AppArgs, ModelArgs

        model = ModelArgs(variant_uri=self.variant_uri, name="bench", gpus_per_replica=self.gpus)
        return AppArgs(
            models=(model,),
            host="127.0.0.1",
            context=_CONTEXT["cuda" if self.gpus else "cpu"],
            max_concurrent_requests=_SLOTS,
            # Each request is another image's; a prefix kept for one would help neither side.
            kept_prefixes=0,
        )


def _gpus() -> float:
    """Return the GPUs of one engine where two share what this machine has."""
    import torch

    return min(1.0, torch.cuda.device_count() / 2)


def _make_variant(folder: Path) -> str:
    """Write the embedded model as a variant; return its URI."""
    from llava_ray.artifacts.records import Variant
    from llava_ray.artifacts.store import ArtifactStore
    from llava_ray.models.folder import EMBEDDED
    from llava_ray.quantize.registry import spec_for
    from llava_ray.quantize.spec import Calibration

    spec = spec_for(_SLUG)
    with ArtifactStore(str(folder)).build(Variant, "variant-bench", settings={}) as build:
        calibration = Calibration(dataset_folder=build.folder, num_samples=0)
        spec.quantize(EMBEDDED, build.folder, calibration, "cpu")
        variant = build.finish(
            Variant,
            device="cpu",
            slug=_SLUG,
            method=spec.method,
            bits_per_weight=spec.bits_per_weight(),
            quantize_s=0.0,
            peak_memory_bytes=0,
        )
    return variant.uri


def _serve(scene: Scene, port: int) -> str:
    """Start the real application; return the host that it listens on."""
    from ray import serve

    from llava_ray.deploy.application import start_serve
    from llava_ray.server.application import build

    args = scene.args
    start_serve(args.host, port, args.request_timeout_s)
    serve.run(build(args), name="bench", route_prefix="/")
    return str(args.host)


class BareEngine:
    """The served scheduler and its engine, in a process of their own: no HTTP, no text."""

    def __init__(self, scene: Scene) -> None:
        from llava_ray.inference.metrics import Recorder
        from llava_ray.server.loading import open_variant

        self._engine, self._card = open_variant(scene.args.models[0], scene.args)
        recorder = Recorder(model="bench", replica="bare", device=self._engine.device)
        self._scheduler = Scheduler(self._engine, max_waiting=_SLOTS, recorder=recorder)
        self._scheduler.start()

    def about(self) -> dict[str, str]:
        """Say what is measured, and on what."""
        device = f"{device_name(self._engine.device)}, {os.cpu_count()} CPUs"
        return {"device": device, "variant": self._card.slug}

    def load(self, count: int, clients: int) -> list[Timeline]:
        """Answer `count` prompts from `clients` closed loops."""
        from llava_ray.inference.prompts import make_prompt

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
            scheduler.submit(left[client].popleft(), sampling, _TIMEOUT_S, outlet, client)

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


def _image(index: int) -> "Image.Image":
    """Draw a sign; each index gives other pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_SIDE, _SIDE), (index % 256, index * 7 % 256, 90))
    ImageDraw.Draw(image).text((40, 150), f"GATE {index}", fill="white", font_size=60)
    return image


def _body(index: int) -> bytes:
    stream = io.BytesIO()
    _image(index).save(stream, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": _QUESTION},
    ]
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


def _measure(bare: Any, host: str, port: int, rounds: int | None) -> dict[str, Any]:
    import ray

    bodies = [_body(i) for i in range(max(_REQUESTS.values()))]
    drive(host, port, bodies[:2], clients=2, tokens=_TOKENS)
    ray.get(bare.load.remote(2, 2))
    loads: dict[str, Any] = {}
    for clients in CLIENTS:
        count, repeats = _REQUESTS[clients], rounds or _ROUNDS[clients]
        sides: dict[str, list[list[Timeline]]] = {"bare": [], "served": []}
        before = _cpu_s()
        for number in range(repeats):
            # Who goes first changes, so that neither profits from a machine that slows down.
            for side in ("bare", "served") if number % 2 else ("served", "bare"):
                if side == "bare":
                    done = ray.get(bare.load.remote(count, clients))
                else:
                    done = drive(host, port, bodies[:count], clients=clients, tokens=_TOKENS)
                sides[side].append(done)
        tokens = repeats * count * _TOKENS
        loads[str(clients)] = compare(sides["bare"], sides["served"]) | {
            "rounds": repeats,
            "requests_per_round": count,
            "cpu_ms_per_token": {
                name: 1000 * (used - before.get(name, 0.0)) / tokens
                for name, used in _cpu_s().items()
            },
        }
        logger.info("%d clients: %s", clients, json.dumps(loads[str(clients)]))
    return {
        **ray.get(bare.about.remote()),
        "code_version": __version__,
        "code_digest": code_digest("serving"),
        "ray": ray.__version__,
        "tokens_per_answer": _TOKENS,
        "goals": {
            "added_first_token_ms": GOAL_FIRST_TOKEN_MS,
            "added_per_token_ms": GOAL_PER_TOKEN_MS,
            "throughput_share": GOAL_THROUGHPUT_SHARE,
        },
        "clients": loads,
    }


def compare(
    bare: Sequence[Sequence[Timeline]], served: Sequence[Sequence[Timeline]]
) -> dict[str, Any]:
    """Return percentiles of both sides' requests, and medians over the rounds of what is added."""
    pairs = [(summarize([ours]), summarize([theirs]))
             for ours, theirs in zip(served, bare, strict=True)]  # fmt: skip

    def added_ms(key: str) -> float:
        return statistics.median(ours[key] - theirs[key] for ours, theirs in pairs)

    shares = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    added = {
        "added_first_token_ms": added_ms("first_token_p50_ms"),
        "added_per_token_ms": added_ms("per_token_p50_ms"),
        "throughput_share": statistics.median(shares),
    }
    met = {
        "first_token": added["added_first_token_ms"] <= GOAL_FIRST_TOKEN_MS,
        "per_token": added["added_per_token_ms"] <= GOAL_PER_TOKEN_MS,
        "throughput": added["throughput_share"] >= GOAL_THROUGHPUT_SHARE,
    }
    return {**added, "goals_met": met, "bare": summarize(bare), "served": summarize(served)}


def summarize(rounds: Sequence[Sequence[Timeline]]) -> dict[str, float]:
    """Return percentiles over the requests of all rounds, and the median round's tokens/s."""
    requests = [timeline for each in rounds for timeline in each]
    first = [1000 * t.first_token_s for t in requests]
    later = [1000 * t.per_token_s for t in requests]
    return {
        "first_token_p50_ms": statistics.median(first),
        "first_token_p99_ms": _p99(first),
        "per_token_p50_ms": statistics.median(later),
        "per_token_p99_ms": _p99(later),
        "tokens_per_s": statistics.median(_tokens_per_s(each) for each in rounds),
    }


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def _tokens_per_s(timelines: Sequence[Timeline]) -> float:
    took = max(t.last for t in timelines) - min(t.sent for t in timelines)
    return sum(t.tokens for t in timelines) / took


def _cpu_s() -> dict[str, float]:
    """Return the CPU seconds that each process of the line has used so far."""
    import psutil

    found = {"load_generator": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        for name, mark in _PROCESSES.items():
            if mark in title:
                found[name] = sum(process.cpu_times()[:2])
    return found
