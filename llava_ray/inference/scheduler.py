"""Many answers at a time from one engine: a thread owns it, slots fill as they come free.

Between two decode steps at most one prompt is prefilled, so that a burst of new requests does not
stall those that are being answered.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llava_ray.errors import DataError, ResourceError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.generate import FinishReason, budget, decodes_ahead
from llava_ray.inference.metrics import Recorder
from llava_ray.inference.request_errors import (
    ApiError,
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from llava_ray.inference.sampling import Row, Sampled, SamplingParams, Step, sample

logger = logging.getLogger(__name__)

_PREFILL_FAILURES = 3
"""Unexpected ones in a row that make the engine count as broken."""


Item = Step | FinishReason | ApiError
"""A token, or how an answer ended."""
Outlet = Callable[[list[tuple[Hashable, Item]]], None]
"""Takes what came in one moment for all answers that go its way, on the engine's thread."""


@dataclass(frozen=True)
class Chunk:
    """The tokens that came since the last chunk; the last one says why the answer ended."""

    steps: tuple[Step, ...]
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Answer:
    """One request on its way; belongs to the scheduler's thread but for `cancelled`."""

    prompt: Prompt
    row: Row
    deadline: float
    outlet: Outlet
    key: Hashable
    """What names it to the outlet."""
    arrived: float
    cancelled: bool = False
    slot: int | None = None
    left: int = 0
    """Tokens that may still be asked of the engine."""
    emitted: int = 0
    last_token_at: float = 0.0
    over: bool = False


@dataclass
class _Batch:
    """Sampled tokens, with the answers they belong to."""

    sampled: Sampled
    answers: list[Answer]
    was_read: bool = False


class Scheduler:
    """Batch requests continuously over an engine's slots."""

    def __init__(self, engine: Engine, *, max_waiting: int, recorder: Recorder) -> None:
        self.failure: BaseException | None = None
        """What broke the engine, if anything did; all later requests are refused."""
        self._engine = engine
        self._max_waiting = max_waiting
        self._recorder = recorder
        self._ahead = decodes_ahead(engine)
        self._wake = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._closing = False
        self._batches: list[_Batch] = []
        self._active: list[Answer] = []
        self._prefilling = 0
        self._prefill_failures = 0
        self._outbox: list[tuple[Answer, Item]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Fail what is left, end the thread and close the engine."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._engine.close()

    def check(self) -> None:
        """Raise Unavailable when the engine's thread has ended."""
        if self.failure is not None or self._closing:
            raise Unavailable("the engine has stopped; another replica takes its place")

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens as they come; leaving the iteration frees the slot.

        Raises Overloaded when the queue is full, DeadlineExceeded, Unavailable when the engine
        broke, BadRequest when the engine refuses the prompt.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Item] = asyncio.Queue()

        def put(items: list[tuple[Hashable, Item]]) -> None:
            # The loop closes first where a process is ending.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, inbox, [item for _, item in items])

        answer = self.submit(prompt, sampling, timeout_s, put)
        try:
            async with aclosing(chunks_from(inbox)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.cancel(answer)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        timeout_s: float,
        outlet: Outlet,
        key: Hashable = None,
    ) -> Answer:
        """Queue a request; the outlet gets its tokens with its key, then how it ended.

        Raises Overloaded when the queue is full and Unavailable when the engine broke.
        """
        now = time.monotonic()
        answer = Answer(prompt, Row(sampling), now + timeout_s, outlet, key, now)
        with self._wake:
            self.check()
            if len(self._waiting) >= self._max_waiting + self._free_slots():
                raise Overloaded(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.append(answer)
            self._recorder.waiting(len(self._waiting))
            self._wake.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop working on an answer, unless it has ended."""
        if answer.over:
            return
        with self._wake:
            answer.cancelled = True
            self._wake.notify()

    def _free_slots(self) -> int:
        return self._engine.slots - len(self._active) - self._prefilling

    def _run(self) -> None:
        try:
            while self._await_work():
                self._drop_dead()
                self._admit()
                self._advance()
                self._deliver()
        except Exception as error:
            logger.exception("the engine broke")
            self.failure = error
        self._fail_all()

    def _await_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._closing):
                self._wake.wait()
            return not self._closing

    def _drop_dead(self) -> None:
        """Free what was cancelled or is past its deadline."""
        now = time.monotonic()
        with self._wake:
            waiting, self._waiting = self._waiting, deque()
            for answer in waiting:
                if not answer.cancelled and answer.deadline > now:
                    self._waiting.append(answer)
                else:
                    self._end(answer, DeadlineExceeded("the deadline passed in the queue"))
            self._recorder.waiting(len(self._waiting))
        for answer in list(self._active):
            if answer.cancelled or answer.deadline <= now:
                self._end(answer, DeadlineExceeded("the deadline passed before the answer ended"))

    def _admit(self) -> None:
        """Prefill waiting prompts: one, or as many as fit where nothing else is under way."""
        alone = not self._active
        while self._free_slots():
            with self._wake:
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
                self._recorder.waiting(len(self._waiting))
                self._prefilling = 1
            self._prefill(answer)
            self._prefilling = 0
            if not alone:
                return
            # A burst's first tokens do not wait for its last prompt.
            self._read(self._batches)
            self._deliver()

    def _prefill(self, answer: Answer) -> None:
        answer.left = budget(self._engine, answer.prompt, answer.row.sampling)
        try:
            answer.slot, logits = self._engine.prefill(answer.prompt)
        except DataError as error:
            self._end(answer, BadRequest(str(error), "messages", "context_length_exceeded"))
        except ResourceError as error:
            self._end(answer, Unavailable(str(error)))
        except Exception as error:
            # One hostile prompt must not take the replica down; a broken engine fails on all.
            logger.exception("a prompt could not be prefilled")
            self._end(answer, ApiError("the engine failed on this prompt"))
            self._prefill_failures += 1
            if self._prefill_failures >= _PREFILL_FAILURES:
                raise RuntimeError(f"{_PREFILL_FAILURES} prompts in a row failed") from error
        else:
            self._prefill_failures = 0
            self._active.append(answer)
            self._recorder.active(len(self._active), len(answer.prompt.input_ids))
            if answer.left == 0:
                self._end(answer, "length")
                return
            answer.left -= 1
            self._batches.append(_Batch(sample(logits.unsqueeze(0), [answer.row]), [answer]))

    def _advance(self) -> None:
        """Read the sampled tokens and decode the next ones, in the order the device likes."""
        batches, self._batches = self._batches, []
        if not self._ahead:
            self._read(batches)
            # A step takes long where it is not launched ahead: what is known goes out before it.
            self._deliver()
        following = self._decode(batches)
        if self._ahead:
            self._read(batches)
        if following is not None:
            self._batches.append(following)

    def _decode(self, batches: Sequence[_Batch]) -> _Batch | None:
        import torch

        answers: list[Answer] = []
        tokens: list[torch.Tensor] = []
        for batch in batches:
            keep = [i for i, a in enumerate(batch.answers) if not a.over and a.left > 0]
            if not keep:
                continue
            answers += [batch.answers[i] for i in keep]
            whole = len(keep) == len(batch.answers)
            tokens.append(batch.sampled.tokens if whole else batch.sampled.tokens[keep])
        if not answers:
            return None
        slots = [a.slot for a in answers if a.slot is not None]
        logits = self._engine.decode(slots, tokens[0] if len(tokens) == 1 else torch.cat(tokens))
        for answer in answers:
            answer.left -= 1
        return _Batch(sample(logits, [a.row for a in answers]), answers)

    def _read(self, batches: Sequence[_Batch]) -> None:
        for batch in batches:
            if batch.was_read:
                continue
            batch.was_read = True
            for answer, step in zip(batch.answers, batch.sampled.read(), strict=True):
                if not answer.over:
                    self._emit(answer, step)

    def _emit(self, answer: Answer, step: Step) -> None:
        if step.token_id == self._engine.eos_token_id and not answer.row.sampling.ignore_eos:
            self._end(answer, "stop")
            return
        now = time.monotonic()
        if answer.emitted:
            self._recorder.token(now - answer.last_token_at)
        else:
            self._recorder.first_token(now - answer.arrived)
        answer.last_token_at = now
        answer.emitted += 1
        self._outbox.append((answer, step))
        if answer.emitted == budget(self._engine, answer.prompt, answer.row.sampling):
            self._end(answer, "length")

    def _end(self, answer: Answer, outcome: FinishReason | ApiError) -> None:
        answer.over = True
        if answer.slot is not None:
            self._engine.release(answer.slot)
            self._active.remove(answer)
            self._recorder.active(len(self._active), 0)
        name = outcome if isinstance(outcome, str) else type(outcome).__name__
        self._recorder.ended("cancelled" if answer.cancelled else name)
        if not answer.cancelled:
            self._outbox.append((answer, outcome))

    def _deliver(self) -> None:
        """Hand over what has come, in one call for all answers with the same outlet."""
        ways: dict[Outlet, list[tuple[Hashable, Item]]] = {}
        for answer, item in self._outbox:
            ways.setdefault(answer.outlet, []).append((answer.key, item))
        self._outbox = []
        for outlet, items in ways.items():
            outlet(items)

    def _fail_all(self) -> None:
        with self._wake:
            left = [*self._waiting, *self._active]
            self._waiting.clear()
            self._closing = True
        for answer in left:
            if not answer.over:
                self._end(answer, Unavailable("the engine stopped before the answer ended"))
        self._deliver()


async def chunks_from(inbox: "asyncio.Queue[Item]") -> AsyncGenerator[Chunk, None]:
    """Yield one answer's items as chunks until it ends; what came meanwhile comes together."""
    while True:
        items = [await inbox.get()]
        while not inbox.empty():
            items.append(inbox.get_nowait())
        steps = tuple(item for item in items if isinstance(item, Step))
        last = items[-1]
        if isinstance(last, Step):
            yield Chunk(steps)
            continue
        if isinstance(last, ApiError):
            if steps:
                yield Chunk(steps)
            raise last
        yield Chunk(steps, last)
        return


def _put_all(inbox: "asyncio.Queue[Item]", items: Sequence[Item]) -> None:
    for item in items:
        inbox.put_nowait(item)
