"""Counters and histograms of one process, in Prometheus's text format."""

import os
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

__all__ = [
    "CONTENT_TYPE",
    "Recorder",
    "device_memory_bytes",
    "exposition_of",
    "merge_expositions",
    "resident_bytes",
]

# A series of creation times beside each counter and histogram is of no use here.
disable_created_metrics()  # type: ignore[no-untyped-call]

_QUEUE = ("queue_requests", "Requests that wait for a slot")
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Recorder:
    """What a scheduler reports; every series carries the model's name and the replica's."""

    def __init__(self, *, model: str, replica: str, device: str = "cpu") -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model": model, "replica": replica}
        self._device = device
        self._waiting = self._gauge(*_QUEUE)
        self._active = self._gauge("active_requests", "Requests being answered")
        self._memory = Gauge(
            "llava_ray_memory_bytes",
            "Memory of the replica's process",
            [*self._labels, "kind"],
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN_S
        )
        self._token = self._histogram(
            "time_per_token_seconds", "Between two tokens of an answer", _TOKEN_S
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens prefilled")
        self._tokens = self._counter("generated_tokens", "Tokens generated")
        self._ended = Counter(
            "llava_ray_requests",
            "Requests that ended, by how",
            [*self._labels, "outcome"],
            registry=self.registry,
        )

    def waiting(self, count: int) -> None:
        """Set how many requests wait."""
        self._waiting.set(count)

    def active(self, count: int, prompt_tokens: int) -> None:
        """Set how many requests are being answered; count a prefilled prompt's tokens."""
        self._active.set(count)
        self._prompt_tokens.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """Count a first token."""
        self._first_token.observe(seconds)
        self._tokens.inc()

    def token(self, seconds: float) -> None:
        """Count a later token."""
        self._token.observe(seconds)
        self._tokens.inc()

    def ended(self, outcome: str) -> None:
        """Count an ended request."""
        self._ended.labels(**self._labels, outcome=outcome).inc()

    def exposition(self) -> bytes:
        """Return all series as Prometheus reads them."""
        self._memory.labels(**self._labels, kind="resident").set(resident_bytes())
        device = device_memory_bytes(self._device)
        if device is not None:
            self._memory.labels(**self._labels, kind="device").set(device)
        return exposition_of(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        metric = Gauge(f"llava_ray_{name}", text, list(self._labels), registry=self.registry)
        return metric.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        metric = Counter(f"llava_ray_{name}", text, list(self._labels), registry=self.registry)
        return metric.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(
            f"llava_ray_{name}", text, list(self._labels), registry=self.registry, buckets=buckets
        )
        return metric.labels(**self._labels)


def queue_exposition(model: str, waiting: int) -> bytes:
    """Return the series of an ingress's queue, beside those of the replicas' own."""
    name, text = _QUEUE
    registry = CollectorRegistry()
    gauge = Gauge(f"llava_ray_{name}", text, ["model", "replica"], registry=registry)
    gauge.labels(model=model, replica="ingress").set(waiting)
    return exposition_of(registry)


def exposition_of(registry: CollectorRegistry) -> bytes:
    """Return a registry's series as Prometheus reads them."""
    return generate_latest(registry)


def merge_expositions(texts: Sequence[bytes]) -> bytes:
    """Join several processes' series, each family's help and type standing once."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        family = ""
        for line in text.decode().splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
            head, samples = families.setdefault(family, ([], []))
            if not line.startswith("# "):
                samples.append(line)
            elif line not in head:
                head.append(line)
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return "".join(f"{line}\n" for line in lines).encode()


def resident_bytes() -> int:
    """Return this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_memory_bytes(device: str) -> int | None:
    """Return what this process has allocated on a GPU, or None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.memory_allocated(device)
