"""The asking side: start an engine's process, watch it, and start it again when it dies or hangs.

A request whose answer has not started goes to the next process; one that has started ends with an
error. All of it belongs to one event loop.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from llava_ray.errors import ResourceError
from llava_ray.inference.engine import Prompt
from llava_ray.inference.process.messages import (
    Ask,
    Beat,
    Cancel,
    Opened,
    Part,
    Picture,
    Refused,
    ToEngine,
    frame,
    read,
)
from llava_ray.inference.request_errors import DeadlineExceeded, Unavailable, from_plain
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk, Item, chunks_from
from llava_ray.resources.crash import crash_file, read_crash

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
"""Processes that a request which has not started is given to."""
_RESTARTS = 3
"""Starts in a row that may fail before the engine counts as broken."""
_RESTART_PAUSE_S = 1.0
_SILENCE_S = 5.0
"""Without a beat; the process is then ended."""
_LOOK_EVERY_S = 0.5


class EngineLost(Unavailable):
    """The engine's process ended before the answer did."""

    code = "engine_lost"


class EngineProcess:
    """An engine in a child process, as long as this one lives.

    It is started as `python -m module arguments... FD`, and the module calls `child.serve_engine`
    with the socket of the file descriptor. Logs and the file of a crash call it by its name.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *arguments: str,
        step_timeout_s: float,
        on_beat: Callable[[Beat], None] = lambda beat: None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._command = name, (module, *arguments)
        self._step_timeout_s = step_timeout_s
        self._on_beat, self._on_loss = on_beat, on_loss
        self._life: _Life | None = None
        self._broken = ""
        """Why it is not started any more."""
        self._changed = asyncio.Event()
        """Replaced whenever `_life` or `_broken` changes."""
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> Opened:
        """Start the process and wait until its engine is loaded.

        Raises ResourceError with the engine's own reason, or how its process died.
        """
        self._life = await _Life.begin(self._name, self._command, self._on_beat)
        self._supervisor = asyncio.create_task(self._supervise(self._life))
        return self._life.opened

    async def close(self) -> None:
        """End the process; what it was asked ends with an error."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._life is not None:
            self._life.kill("closed")
            await self._life.watch(self._step_timeout_s)
            await self._life.death()

    def check(self) -> None:
        """Raise Unavailable where requests would have to wait for the engine's process."""
        self.check_alive()
        if self._life is None:
            raise Unavailable(f"{self._name} is being started again")
        if self._life.silence_s() > _SILENCE_S:
            raise Unavailable(f"{self._name} does not react")

    def check_alive(self) -> None:
        """Raise Unavailable where the engine could not be started again."""
        if self._broken:
            raise Unavailable(f"{self._name}: {self._broken}")

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; leaving the iteration stops the engine's work on it.

        Raises EngineLost when its process ends after the first token, DeadlineExceeded, and what
        the engine raises.
        """
        deadline = time.monotonic() + timeout_s
        for attempt in range(1, _ATTEMPTS + 1):
            life = await self._await_life(deadline)
            started = False
            try:
                chunks = life.stream(prompt, sampling, deadline - time.monotonic())
                async with aclosing(chunks):
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except EngineLost:
                if started or attempt == _ATTEMPTS:
                    raise

    async def _await_life(self, deadline: float) -> "_Life":
        while self._life is None or self._life.ended:
            self.check_alive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("the engine was not started again in time") from error
        return self._life

    async def _supervise(self, life: "_Life") -> None:
        while True:
            await life.watch(self._step_timeout_s)
            self._set(None)
            self._on_loss()
            logger.error("%s: %s; it is started again", self._name, await life.death())
            for attempt in range(1, _RESTARTS + 1):
                try:
                    life = await _Life.begin(self._name, self._command, self._on_beat)
                except ResourceError as error:
                    logger.error("%s: %s", self._name, error)
                    if attempt == _RESTARTS:
                        self._set(None, broken=str(error))
                        return
                    await asyncio.sleep(_RESTART_PAUSE_S)
                else:
                    break
            self._set(life)

    def _set(self, life: "_Life | None", broken: str = "") -> None:
        self._life, self._broken = life, broken
        self._changed.set()
        self._changed = asyncio.Event()


class _Life:
    """One process of an engine, from its start to its end."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", writer: asyncio.StreamWriter, name: str
    ) -> None:
        self.process = process
        self._writer = writer
        self._name = name
        self._answers: dict[int, asyncio.Queue[Item]] = {}
        self._asked = 0
        self._last_beat = self._last_step = time.monotonic()
        self._steps = 0
        self._end = ""
        """Why it was ended from here."""
        self.opened: Opened
        self._listening: asyncio.Task[None]

    @classmethod
    async def begin(
        cls, name: str, command: Sequence[str], on_beat: Callable[[Beat], None]
    ) -> "_Life":
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ray may have added to the path of this process alone.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        life = cls(process, writer, name)
        try:
            message = await read(reader)
            if isinstance(message, Refused):
                raise ResourceError(message.reason)
        except EOFError:
            await life.hang_up()
            raise ResourceError(f"{name}: {await life.death()}") from None
        except BaseException:
            process.kill()
            await life.hang_up()
            await life.death()
            raise
        life.opened = message
        life._last_beat = life._last_step = time.monotonic()
        life._listening = asyncio.create_task(life._listen(reader, on_beat))
        return life

    def kill(self, why: str) -> None:
        """End the process, whatever it does."""
        self._end = why
        self.process.kill()

    async def hang_up(self) -> None:
        """Close the connection."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def death(self) -> str:
        """Wait for the process and say in one line how it ended."""
        code = await asyncio.to_thread(self.process.wait)
        if self._end:
            return self._end
        path = crash_file(f"{self._name}-{self.process.pid}")
        crash = read_crash(path, code)
        if not crash or not crash.is_fault:
            path.unlink(missing_ok=True)
        return crash.describe() if crash else f"its process ended with exit code {code}"

    @property
    def ended(self) -> bool:
        """Whether it takes no requests any more."""
        return self._listening.done()

    def silence_s(self) -> float:
        """Return the seconds since the last beat."""
        return time.monotonic() - self._last_beat

    async def watch(self, step_timeout_s: float) -> None:
        """Wait for the process's end; kill it when it does not react or takes no step."""
        while not self.ended:
            before = time.monotonic()
            await asyncio.wait({self._listening}, timeout=_LOOK_EVERY_S)
            if time.monotonic() - before > 2 * _LOOK_EVERY_S:
                continue  # This process was late itself, and has beats to read.
            if self.silence_s() > _SILENCE_S:
                self.kill(f"no sign of life for {_SILENCE_S:g} s")
            elif time.monotonic() - self._last_step > step_timeout_s:
                self.kill(f"no step within serve.step_timeout_s={step_timeout_s:g} s")
        await self._listening

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        number = self._asked = self._asked + 1
        inbox = self._answers[number] = asyncio.Queue()
        images = [Picture(bytearray(i.tiles), i.num_tokens, i.size) for i in prompt.images]
        self._send(Ask(number, prompt.input_ids, images, sampling))
        try:
            async with aclosing(chunks_from(inbox, timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if self._answers.pop(number, None) is not None:
                self._send(Cancel(number))

    def _send(self, message: ToEngine) -> None:
        # What a process that does not read has not taken yet waits in this one's memory.
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _listen(self, reader: asyncio.StreamReader, on_beat: Callable[[Beat], None]) -> None:
        """Take what comes until the process ends; what has not ended then is lost."""
        try:
            while True:
                message = await read(reader)
                if isinstance(message, Beat):
                    self._note(message)
                    on_beat(message)
                else:
                    for part in message.parts:
                        self._deliver(part)
        except (EOFError, OSError):
            pass
        finally:
            await self.hang_up()
            for inbox in self._answers.values():
                inbox.put_nowait(EngineLost("the engine was lost before the answer ended"))
            self._answers.clear()

    def _note(self, beat: Beat) -> None:
        self._last_beat = time.monotonic()
        if beat.steps != self._steps or not (beat.waiting or beat.active):
            self._steps, self._last_step = beat.steps, self._last_beat

    def _deliver(self, part: Part) -> None:
        ended = part.finish_reason is not None or part.error is not None
        inbox = self._answers.pop(part.number, None) if ended else self._answers.get(part.number)
        if inbox is None:
            return
        for step in part.steps:
            inbox.put_nowait(step)
        if part.error is not None:
            inbox.put_nowait(from_plain(part.error))
        elif part.finish_reason is not None:
            inbox.put_nowait(part.finish_reason)
