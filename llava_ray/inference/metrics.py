"""Counters and histograms of one process, in Prometheus's text format."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
Metric = TypeVar("Metric", Counter, Gauge, Histogram)

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
        self._waiting = self._metric(Gauge, *_QUEUE)
        self._active = self._metric(Gauge, "active_requests", "Requests being answered")
        self._memory = self._metric(
            Gauge, "memory_bytes", "Memory of the replica's process", further="kind"
        )
        self._first_token = self._metric(
            Histogram,
            "time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_FIRST_TOKEN_S,
        )
        self._token = self._metric(
            Histogram, "time_per_token_seconds", "Between two tokens of an answer", buckets=_TOKEN_S
        )
        self._prompt_tokens = self._metric(Counter, "prompt_tokens", "Prompt tokens prefilled")
        self._tokens = self._metric(Counter, "generated_tokens", "Tokens generated")
        self._ended = self._metric(
            Counter, "requests", "Requests that ended, by how", further="outcome"
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
        if self._device.startswith("cuda"):
            import torch

            allocated = torch.cuda.memory_allocated(self._device)
            self._memory.labels(**self._labels, kind="device").set(allocated)
        return exposition_of(self.registry)

    def _metric(
        self, kind: type[Metric], name: str, text: str, *, further: str = "", **options: Any
    ) -> Metric:
        """Register a metric; with a further label it still wants that label's values."""
        labels = [*self._labels, further] if further else list(self._labels)
        metric = kind(f"llava_ray_{name}", text, labels, registry=self.registry, **options)
        return metric if further else metric.labels(**self._labels)


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
