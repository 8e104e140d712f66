"""What a replica counts, by Serve's metrics: Ray exports them from every node."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import aiohttp
import ray
from ray.serve import metrics

from llava_ray.inference.process.messages import Beat
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.scheduler import Chunk

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "ray_llava_ray_"
_SCRAPE_TIMEOUT_S = 1.5
_FIRST_TOKEN_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
_TOKEN_S = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]


class Recorder:
    """The series of one served model."""

    def __init__(self, model: str) -> None:
        self._tags = {"model": model}
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the parsed request to its first token",
            _FIRST_TOKEN_S,
        )
        self._token = self._histogram(
            "time_per_token_seconds", "Between two tokens of an answer", _TOKEN_S
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self._tokens = self._counter("generated_tokens", "Tokens generated")
        self._requests = self._counter("requests", "Answers that ended, by how", "outcome")
        self._restarts = self._counter("engine_restarts", "Engine processes that were lost")
        self._waiting = self._gauge("waiting_requests", "Requests that wait for a slot")
        self._active = self._gauge("active_requests", "Requests being answered")
        self._memory = self._gauge("memory_bytes", "Memory of the engine's process", "kind")

    async def record(
        self, prompt_tokens: int, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Chunk, None]:
        """Pass an answer's chunks on and count them."""
        self._prompt_tokens.inc(prompt_tokens, self._tags)
        outcome, last, started = "cancelled", time.monotonic(), False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    now, count = time.monotonic(), len(chunk.steps)
                    if count:
                        self._tokens.inc(count, self._tags)
                        if started:
                            self._token.observe((now - last) / count, self._tags)
                        else:
                            self._first_token.observe(now - last, self._tags)
                        last, started = now, True
                    outcome = chunk.finish_reason or outcome
                    yield chunk
        except ApiError as error:
            outcome = error.code or type(error).__name__
            raise
        finally:
            self._requests.inc(1, {**self._tags, "outcome": outcome})

    def beat(self, beat: Beat) -> None:
        """Note what the engine is at."""
        self._waiting.set(beat.waiting, self._tags)
        self._active.set(beat.active, self._tags)
        for kind, value in (("resident", beat.resident_bytes), ("device", beat.device_bytes)):
            if value is not None:
                self._memory.set(value, {**self._tags, "kind": kind})

    def lost(self) -> None:
        """Count an engine process that died or was ended."""
        self._restarts.inc(1, self._tags)

    def _histogram(self, name: str, text: str, boundaries: list[float]) -> Any:
        return metrics.Histogram(f"llava_ray_{name}", text, boundaries, tag_keys=("model",))

    def _counter(self, name: str, text: str, *tags: str) -> Any:
        return metrics.Counter(f"llava_ray_{name}", text, tag_keys=("model", *tags))  # type: ignore[arg-type]

    def _gauge(self, name: str, text: str, *tags: str) -> Any:
        return metrics.Gauge(f"llava_ray_{name}", text, tag_keys=("model", *tags))  # type: ignore[arg-type]


async def scrape() -> bytes:
    """Return this project's series of all replicas, as each node's Ray exports them.

    A node that does not answer is left out. Ray passes on what is counted every few seconds.
    """
    if not ray.is_initialized():
        return b""
    nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    timeout = aiohttp.ClientTimeout(total=_SCRAPE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
        texts = await asyncio.gather(*(_scrape_node(session, url) for url in urls))
    lines = dict.fromkeys(line for text in texts for line in text.splitlines() if _PREFIX in line)
    # The sort is stable: what explains a family comes before its samples, once.
    ordered = sorted(lines, key=lambda line: not line.startswith("#"))
    return "".join(f"{line}\n" for line in ordered).encode()


async def _scrape_node(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            return await response.text(errors="replace")
    except (aiohttp.ClientError, OSError):
        return ""
