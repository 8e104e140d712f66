"""Many answers at a time from one engine: a thread owns it, slots fill as they come free.

Between two decode steps only as many prompts are prefilled as `admission.py` says, so that a burst
of new requests does not stall those that are being answered.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_ray.errors import DataError, ResourceError
from llava_ray.inference.admission import prompts_together
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.generate import FinishReason, budget, decodes_ahead
from llava_ray.inference.grammar import GrammarCompiler
from llava_ray.inference.request_errors import ApiError, BadRequest, DeadlineExceeded, Unavailable
from llava_ray.inference.sampling import Row, Sampled, SamplingParams, Step, sample

if TYPE_CHECKING:
    import torch

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
    outlet: Outlet
    key: Hashable
    """What names it to the outlet."""
    cancelled: bool = False
    slot: int | None = None
    left: int = 0
    """Tokens that may still be asked of the engine."""
    emitted: int = 0
    over: bool = False


@dataclass
class _Batch:
    """Sampled tokens, with the answers they belong to."""

    sampled: Sampled
    answers: list[Answer]
    was_read: bool = False


class Scheduler:
    """Batch requests continuously over an engine's slots."""

    def __init__(self, engine: Engine) -> None:
        self.failure: BaseException | None = None
        """What broke the engine, if anything did; all later requests are refused."""
        self.steps = 0
        """Prefills and decode steps that have ended."""
        self.engine = engine
        self._ahead = decodes_ahead(engine)
        self._grammars = GrammarCompiler(
            engine.tokenizer, vocab_size=engine.vocab_size, eos_token_id=engine.eos_token_id
        )
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
        self.engine.close()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and that are being answered."""
        return len(self._waiting), len(self._active) + self._prefilling

    def submit(
        self, prompt: Prompt, sampling: SamplingParams, outlet: Outlet, key: Hashable = None
    ) -> Answer:
        """Queue a request; the outlet gets its tokens with its key, then how it ended.

        Raises Unavailable when the engine broke, BadRequest for a grammar that is too large.
        """
        try:
            matcher = self._grammars.start(sampling.grammar) if sampling.grammar else None
        except DataError as error:
            raise BadRequest(f"response_format: {error}", "response_format") from error
        answer = Answer(prompt, Row(sampling, matcher), outlet, key)
        with self._wake:
            if self.failure is not None or self._closing:
                raise Unavailable("the engine has stopped")
            self._waiting.append(answer)
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
        return self.engine.slots - len(self._active) - self._prefilling

    def _run(self) -> None:
        try:
            while self._await_work():
                self._drop_cancelled()
                self._admit()
                self._advance()
                self._deliver()
                self.steps += 1
        except Exception as error:
            logger.exception("the engine broke")
            self.failure = error
        self._fail_all()

    def _await_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._closing):
                self._wake.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(each for each in self._waiting if not each.cancelled)
        for answer in [each for each in self._active if each.cancelled]:
            self._end(answer, "stop")

    def _admit(self) -> None:
        """Prefill waiting prompts: some, or as many as fit where nothing else is under way."""
        alone = not self._active
        while answers := self._next(alone=alone):
            earlier = list(self._batches)
            self._prefill(answers)
            self._prefilling = 0
            self.steps += 1
            if not alone:
                return
            # A burst's first tokens do not wait for its last prompt; the device has work meanwhile.
            self._read(earlier if self._ahead else self._batches)
            self._deliver()

    def _next(self, *, alone: bool) -> list[Answer]:
        """Take those that are prefilled together off the queue."""
        with self._wake:
            count = prompts_together(
                [len(answer.prompt.input_ids) for answer in self._waiting],
                free_slots=self._free_slots(),
                packed_tokens=self.engine.packed_tokens,
                answering=not alone,
            )
            self._prefilling = count
            return [self._waiting.popleft() for _ in range(count)]

    def _prefill(self, answers: Sequence[Answer]) -> None:
        found = None
        if len(answers) > 1:
            # Whose fault it is, if one fails, each tells alone.
            with contextlib.suppress(Exception):
                found = self.engine.prefill_together([answer.prompt for answer in answers])
        if found is None:
            for answer in answers:
                self._prefill_alone(answer)
            return
        self._prefill_failures = 0
        for answer, (slot, _) in zip(answers, found, strict=True):
            answer.slot = slot
        self._begin(answers, [logits for _, logits in found])

    def _prefill_alone(self, answer: Answer) -> None:
        try:
            answer.slot, logits = self.engine.prefill(answer.prompt)
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
            self._begin([answer], [logits])

    def _begin(self, answers: Sequence[Answer], logits: "Sequence[torch.Tensor]") -> None:
        """Sample the first tokens of prompts that were prefilled."""
        import torch  # Not above: who only asks an engine's process needs none.

        self._active += answers
        asked = []
        for answer, row in zip(answers, logits, strict=True):
            answer.left = budget(self.engine, answer.prompt, answer.row.sampling)
            if answer.left == 0:
                self._end(answer, "length")
                continue
            answer.left -= 1
            asked.append((answer, row))
        if asked:
            first, rows = zip(*asked, strict=True)
            sampled = sample(torch.stack(rows), [answer.row for answer in first])
            self._batches.append(_Batch(sampled, list(first)))

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
        import torch  # Not above: who only asks an engine's process needs none.

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
        logits = self.engine.decode(slots, tokens[0] if len(tokens) == 1 else torch.cat(tokens))
        for answer in answers:
            answer.left -= 1
        if any(answer.row.matcher for answer in answers):
            # What may come next hangs on what has come.
            self._read(batches)
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
        matcher = answer.row.matcher
        if matcher is not None and matcher.failure:
            problem = f"response_format: the answer cannot be kept to it: {matcher.failure}"
            self._end(answer, BadRequest(problem, "response_format"))
            return
        if step.token_id == self.engine.eos_token_id and not answer.row.sampling.ignore_eos:
            self._end(answer, "stop")
            return
        answer.emitted += 1
        self._outbox.append((answer, step))
        if matcher is not None:
            matcher.accept(step.token_id)
            if matcher.complete:
                self._end(answer, "stop")
                return
        if answer.emitted == budget(self.engine, answer.prompt, answer.row.sampling):
            self._end(answer, "length")

    def _end(self, answer: Answer, outcome: FinishReason | ApiError) -> None:
        answer.over = True
        if answer.slot is not None:
            self.engine.release(answer.slot)
            self._active.remove(answer)
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


async def chunks_from(
    inbox: "asyncio.Queue[Item]", timeout_s: float
) -> AsyncGenerator[Chunk, None]:
    """Yield one answer's items as chunks until it ends; what came meanwhile comes together.

    Raises the answer's ApiError, and DeadlineExceeded once the time has passed.
    """
    late = DeadlineExceeded("the deadline passed before the answer ended")
    timer = asyncio.get_running_loop().call_later(timeout_s, inbox.put_nowait, late)
    try:
        while True:
            items = [await inbox.get()]
            while isinstance(items[-1], Step) and not inbox.empty():
                items.append(inbox.get_nowait())
            steps = tuple(item for item in items if isinstance(item, Step))
            last = items[-1]
            if steps and not isinstance(last, str):
                yield Chunk(steps)
            if isinstance(last, ApiError):
                raise last
            if isinstance(last, str):
                yield Chunk(steps, last)
                return
    finally:
        timer.cancel()
