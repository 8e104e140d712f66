"""The engine's side: load it, answer, and end with the process that started this one."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable
from typing import NoReturn

import numpy as np
import psutil

from llava_ray.errors import LlavaRayError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.process.messages import (
    Ask,
    Beat,
    FromEngine,
    Opened,
    Part,
    Refused,
    Tokens,
    frame,
    receive,
)
from llava_ray.inference.request_errors import ApiError
from llava_ray.inference.sampling import Step
from llava_ray.inference.scheduler import Answer, Item, Scheduler
from llava_ray.models.images import ImagePixels

_BEAT_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1


def serve_engine(open_engine: Callable[[], Engine], connection: socket.socket) -> NoReturn:
    """Load an engine and answer what comes over the connection, until that hangs up."""
    _end_with_parent()
    server = _Server(connection)
    threading.Thread(target=server.listen, daemon=True).start()
    try:
        engine = open_engine()
    except LlavaRayError as error:
        server.send(Refused(" ".join(str(error).split())))
        sys.exit(2)
    scheduler = server.scheduler = Scheduler(engine)
    scheduler.start()
    server.send(Opened(*(getattr(engine, name) for name in Opened.__struct_fields__)))
    while scheduler.failure is None:
        waiting, active = scheduler.load
        memory = psutil.Process().memory_info().rss, _device_bytes(engine.device)
        server.send(Beat(scheduler.steps, waiting, active, *memory))
        time.sleep(_BEAT_EVERY_S)
    os._exit(1)


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self.scheduler: Scheduler | None = None
        self._connection = connection
        self._sending = threading.Lock()
        self._answers: dict[int, Answer] = {}

    def send(self, message: FromEngine) -> None:
        with self._sending:
            self._connection.sendall(frame(message))

    def listen(self) -> None:
        """Take requests until the other side hangs up; then nobody waits for this process."""
        try:
            while True:
                message = receive(self._connection)
                assert self.scheduler is not None, "nothing is asked before Opened"
                if isinstance(message, Ask):
                    self._ask(self.scheduler, message)
                elif answer := self._answers.pop(message.number, None):
                    self.scheduler.cancel(answer)
        finally:
            # Not sys.exit: the engine's thread may be in native code for long.
            os._exit(0)

    def _ask(self, scheduler: Scheduler, ask: Ask) -> None:
        size = scheduler.engine.family.vision.image_size
        images = (
            ImagePixels(
                np.frombuffer(image.tiles, np.uint8).reshape(-1, size, size, 3),
                image.num_tokens,
                image.size,
            )
            for image in ask.images
        )
        prompt = Prompt(ask.input_ids, tuple(images))
        try:
            answer = scheduler.submit(prompt, ask.sampling, self._deliver, ask.number)
        except ApiError as error:
            self.send(Tokens([Part(ask.number, [], error=error.plain())]))
            return
        self._answers[ask.number] = answer
        if answer.over:  # It may have ended before it was noted.
            self._answers.pop(ask.number, None)

    def _deliver(self, items: list[tuple[Hashable, Item]]) -> None:
        """Send what one moment brought; on the engine's thread."""
        parts: dict[Hashable, Part] = {}
        for number, item in items:
            assert isinstance(number, int)
            part = parts.setdefault(number, Part(number, []))
            if isinstance(item, Step):
                part.steps.append(item)
                continue
            self._answers.pop(number, None)
            if isinstance(item, ApiError):
                part.error = item.plain()
            else:
                part.finish_reason = item
        self.send(Tokens(list(parts.values())))


def _end_with_parent() -> None:
    """Have Linux kill this process with its parent, even while it is stopped.

    Elsewhere it ends once its connection has.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _device_bytes(device: str) -> int | None:
    """Return what this process has allocated on a GPU, or None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.memory_allocated(device)
