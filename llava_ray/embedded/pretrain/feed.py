"""Processes that render examples into shared memory, and the pool on the GPU that they refill.

Training draws from the pool at its own pace: it never waits for the renderers, it only sees a
picture more often where they are slower.
"""

import contextlib
import logging
import mmap
import multiprocessing
import os
import time
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava_ray.embedded.pretrain.examples import FIELDS, Encoder, ExampleMaker
from llava_ray.embedded.scene_text import Assets

log = logging.getLogger(__name__)

CHUNK = 32
"""Examples that travel at a time."""

Chunk = dict[str, NDArray[Any]]


class Feed:
    """Renderer processes. Make it before CUDA is touched: they are forked.

    Memory is an anonymous map shared by the forks, so the size of /dev/shm does not matter.
    """

    def __init__(
        self, assets: Assets, encoder: Encoder, *, workers: int, chunks_per_worker: int, seed: int
    ) -> None:
        context: ForkContext = multiprocessing.get_context("fork")
        self.slots = _allocate(workers * chunks_per_worker)
        self._ready: Any = context.SimpleQueue()
        self._free: Any = context.SimpleQueue()
        self._progress: Any = context.Value("d", 0.0, lock=False)
        for slot in range(len(self.slots)):
            self._free.put(slot)
        self._workers: list[BaseProcess] = [
            context.Process(
                target=_render_forever,
                args=(self, assets, encoder, seed * 1000 + number),
                daemon=True,
            )
            for number in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def set_progress(self, share: float) -> None:
        """Tell renderers how far the run is, which sets how hard scenes are."""
        self._progress.value = share

    def ready(self) -> int | None:
        """Return the number of a filled slot, or None when there is none yet.

        Raises RuntimeError when every renderer has died.
        """
        if self._ready.empty():
            if not any(worker.is_alive() for worker in self._workers):
                raise RuntimeError("all renderer processes ended; their errors stand above")
            return None
        slot: int = self._ready.get()
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back to the renderers."""
        self._free.put(slot)

    def close(self) -> None:
        """End the renderers."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join(timeout=5)


def _allocate(count: int) -> list[Chunk]:
    slots = []
    for _ in range(count):
        chunk: Chunk = {}
        for name, (shape, dtype) in FIELDS.items():
            size = int(np.prod((CHUNK, *shape))) * np.dtype(dtype).itemsize
            chunk[name] = np.frombuffer(mmap.mmap(-1, size), dtype=dtype).reshape(CHUNK, *shape)
        slots.append(chunk)
    return slots


def _render_forever(feed: Feed, assets: Assets, encoder: Encoder, seed: int) -> None:
    os.nice(5)
    maker = ExampleMaker(assets, encoder, seed)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            slot = feed._free.get()
            chunk = feed.slots[slot]
            for row in range(CHUNK):
                for name, values in maker.make(feed._progress.value).items():
                    chunk[name][row] = values
            feed._ready.put(slot)


def _new_event() -> torch.cuda.Event:
    event: torch.cuda.Event = cast(Any, torch.cuda.Event)()
    return event


class Pool:
    """The newest examples, on the training device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size // CHUNK * CHUNK
        self.device = device
        self.received = 0
        self._in_flight: list[tuple[int, torch.cuda.Event]] = []
        self._fields = {
            name: torch.zeros(
                (self.size, *shape),
                dtype=torch.from_numpy(np.zeros(1, dtype)).dtype,
                device=device,
            )
            for name, (shape, dtype) in FIELDS.items()
        }

    def pin(self, feed: Feed) -> None:
        """Lock the renderers' memory, so that the GPU copies from it without a stop."""
        if self.device.type != "cuda":
            return
        runtime: Any = cast(Any, torch.cuda).cudart()
        for chunk in feed.slots:
            for values in chunk.values():
                failed = int(runtime.cudaHostRegister(values.ctypes.data, values.nbytes, 0))
                if failed:
                    log.warning("pinning %d bytes failed with CUDA error %d", values.nbytes, failed)
                    return

    def refill(self, feed: Feed) -> None:
        """Take what is ready, overwriting the oldest."""
        self._return_copied(feed)
        while (slot := feed.ready()) is not None:
            start = self.received % self.size
            for name, values in feed.slots[slot].items():
                source = torch.from_numpy(values)
                self._fields[name][start : start + CHUNK].copy_(source, non_blocking=True)
            self.received += CHUNK
            if self.device.type == "cuda":
                event = _new_event()
                event.record()
                self._in_flight.append((slot, event))
            else:
                feed.release(slot)

    def _return_copied(self, feed: Feed) -> None:
        waiting = []
        for slot, event in self._in_flight:
            if bool(cast(Any, event).query()):
                feed.release(slot)
            else:
                waiting.append((slot, event))
        self._in_flight = waiting

    def wait_for(self, feed: Feed, count: int) -> None:
        """Block until at least `count` examples have come in."""
        while self.received < min(count, self.size):
            self.refill(feed)
            time.sleep(0.01)

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw examples at random, with repetition."""
        held = min(self.received, self.size)
        chosen = torch.randint(held, (count,), device=self.device, generator=generator)
        return {name: values[chosen] for name, values in self._fields.items()}
