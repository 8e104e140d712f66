import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
import torch
from table_engine import TableEngine

from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import generate_text
from llava_ray.inference.metrics import Recorder
from llava_ray.inference.request_errors import (
    ApiError,
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Scheduler

T = TypeVar("T")


@asynccontextmanager
async def _running(engine: TableEngine, max_waiting: int = 8) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(
        engine, max_waiting=max_waiting, recorder=Recorder(model="m", replica="r")
    )
    scheduler.start()
    try:
        yield scheduler
    finally:
        await asyncio.to_thread(scheduler.close)


async def _answer(
    scheduler: Scheduler, prompt: Prompt, sampling: SamplingParams, timeout_s: float = 10
) -> tuple[tuple[int, ...], str | None]:
    ids: tuple[int, ...] = ()
    reason = None
    async for chunk in scheduler.stream(prompt, sampling, timeout_s):
        ids += tuple(step.token_id for step in chunk.steps)
        reason = chunk.finish_reason
    return ids, reason


def _with(engine: TableEngine, work: Callable[[Scheduler], Awaitable[T]], **options: int) -> T:
    async def main() -> T:
        async with _running(engine, **options) as scheduler:
            return await work(scheduler)

    return asyncio.run(main())


def _prompt(last: int) -> Prompt:
    return Prompt(input_ids=(1, 100, 100 + last))


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_together_are_those_given_alone(ahead: bool) -> None:
    engine = TableEngine(slots=3)
    engine.eos_token_id = 3 + ord("c")
    wanted = [
        SamplingParams(max_tokens=3 + 5 * i, temperature=i % 2, seed=i, ignore_eos=i % 3 == 0)
        for i in range(9)
    ]
    alone = [generate_text(engine, _prompt(i), s) for i, s in enumerate(wanted)]

    async def work(scheduler: Scheduler) -> list[tuple[tuple[int, ...], str | None]]:
        scheduler._ahead = ahead
        return await asyncio.gather(
            *(_answer(scheduler, _prompt(i), s) for i, s in enumerate(wanted))
        )

    together = _with(engine, work, max_waiting=9)
    assert together == [(a.token_ids, a.finish_reason) for a in alone]
    assert {a.finish_reason for a in alone} == {"stop", "length"}
    assert max(engine.batches) == 3
    assert engine.held == {}


class GatedEngine(TableEngine):
    """Decodes nothing until its gate is opened."""

    def __init__(self) -> None:
        super().__init__(slots=1, context=200)
        self.gate = threading.Event()

    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        assert self.gate.wait(60)
        return super().decode(slots, tokens)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    engine = GatedEngine()

    async def work(scheduler: Scheduler) -> list[object]:
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        calls = [
            asyncio.create_task(_answer(scheduler, _prompt(i), sampling, 60)) for i in range(5)
        ]
        while not all(call.done() for call in calls[3:]):
            await asyncio.sleep(0.01)
        engine.gate.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    results = _with(engine, work, max_waiting=2)
    refused = [r for r in results if isinstance(r, Overloaded)]
    assert len(refused) == 2
    assert refused[0].headers() == {"x-should-retry": "true", "retry-after": "1"}


def test_leaving_a_stream_frees_its_slot() -> None:
    engine = TableEngine(slots=1, context=100_000)
    endless = SamplingParams(max_tokens=90_000, ignore_eos=True)

    async def work(scheduler: Scheduler) -> tuple[tuple[int, ...], str | None]:
        stream = scheduler.stream(_prompt(0), endless, 60)
        await anext(stream)
        await stream.aclose()
        return await _answer(scheduler, _prompt(1), SamplingParams(max_tokens=2), timeout_s=5)

    assert len(_with(engine, work)[0]) == 2
    assert engine.held == {}


def test_deadlines_end_answers_and_those_that_wait() -> None:
    engine = TableEngine(slots=1, context=10_000_000)
    endless = SamplingParams(max_tokens=9_000_000, ignore_eos=True)

    async def work(scheduler: Scheduler) -> list[object]:
        calls = (_answer(scheduler, _prompt(i), endless, 0.3) for i in range(2))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = _with(engine, work)
    assert [type(r) for r in results] == [DeadlineExceeded] * 2
    assert engine.held == {}


def test_a_prompt_beyond_the_context_is_the_clients_mistake() -> None:
    engine = TableEngine(context=4)
    with pytest.raises(BadRequest, match="5 tokens"):
        _with(engine, lambda s: _answer(s, Prompt((1, 2, 3, 4, 5)), SamplingParams()))


def test_a_prompt_that_fills_the_context_gets_an_empty_answer() -> None:
    engine = TableEngine(context=4)
    answer = _with(engine, lambda s: _answer(s, Prompt((1, 2, 3, 4)), SamplingParams()))
    assert answer == ((), "length")


def test_one_failing_prompt_leaves_the_engine_running() -> None:
    engine = TableEngine()

    async def work(scheduler: Scheduler) -> int:
        with pytest.raises(ApiError, match="failed on this prompt"):
            await _answer(scheduler, Prompt((99_999,)), SamplingParams())
        assert scheduler.failure is None
        return len((await _answer(scheduler, _prompt(0), SamplingParams(max_tokens=3)))[0])

    assert _with(engine, work) == 3


def test_a_broken_engine_fails_all_and_refuses_more() -> None:
    class Broken(TableEngine):
        def decode(self, slots: object, tokens: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("device lost")

    async def work(scheduler: Scheduler) -> list[object]:
        calls = (_answer(scheduler, _prompt(i), SamplingParams(max_tokens=9)) for i in range(6))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert str(scheduler.failure) == "device lost"
        with pytest.raises(Unavailable):
            await _answer(scheduler, _prompt(0), SamplingParams())
        return results

    results = _with(Broken(slots=2), work)
    assert [type(r) for r in results] == [Unavailable] * 6
