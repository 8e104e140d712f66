import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
import torch
from local_engine import LocalEngine
from table_engine import TableEngine

from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import generate_text
from llava_ray.inference.request_errors import (
    ApiError,
    BadRequest,
    DeadlineExceeded,
    Unavailable,
)
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Item, chunks_from

T = TypeVar("T")


@asynccontextmanager
async def _running(engine: TableEngine) -> AsyncIterator[LocalEngine]:
    local = LocalEngine(engine)
    local.scheduler.start()
    try:
        yield local
    finally:
        await asyncio.to_thread(local.scheduler.close)


async def _answer(
    engine: LocalEngine, prompt: Prompt, sampling: SamplingParams, timeout_s: float = 10
) -> tuple[tuple[int, ...], str | None]:
    ids: tuple[int, ...] = ()
    reason = None
    async for chunk in engine.stream(prompt, sampling, timeout_s):
        ids += tuple(step.token_id for step in chunk.steps)
        reason = chunk.finish_reason
    return ids, reason


def _with(engine: TableEngine, work: Callable[[LocalEngine], Awaitable[T]]) -> T:
    async def main() -> T:
        async with _running(engine) as local:
            return await work(local)

    return asyncio.run(main())


def _prompt(last: int) -> Prompt:
    return Prompt(input_ids=(1, 100, 100 + last))


@pytest.mark.parametrize("packed_tokens", [0, 6])
@pytest.mark.parametrize("ahead", [False, True])
def test_answers_together_are_those_given_alone(ahead: bool, packed_tokens: int) -> None:
    engine = TableEngine(slots=3)
    engine.packed_tokens = packed_tokens
    engine.eos_token_id = 3 + ord("c")
    wanted = [
        SamplingParams(max_tokens=3 + 5 * i, temperature=i % 2, seed=i, ignore_eos=i % 3 == 0)
        for i in range(9)
    ]
    alone = [generate_text(engine, _prompt(i), s) for i, s in enumerate(wanted)]

    async def work(local: LocalEngine) -> list[tuple[tuple[int, ...], str | None]]:
        local.scheduler._ahead = ahead
        return await asyncio.gather(*(_answer(local, _prompt(i), s) for i, s in enumerate(wanted)))

    together = _with(engine, work)
    assert together == [(a.token_ids, a.finish_reason) for a in alone]
    assert {a.finish_reason for a in alone} == {"stop", "length"}
    assert max(engine.batches) == 3
    assert engine.held == {}


def test_leaving_a_stream_frees_its_slot() -> None:
    engine = TableEngine(slots=1, context=100_000)
    endless = SamplingParams(max_tokens=90_000, ignore_eos=True)

    async def work(local: LocalEngine) -> tuple[tuple[int, ...], str | None]:
        stream = local.stream(_prompt(0), endless, 60)
        await anext(stream)
        await stream.aclose()
        return await _answer(local, _prompt(1), SamplingParams(max_tokens=2), timeout_s=5)

    assert len(_with(engine, work)[0]) == 2
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

    async def work(local: LocalEngine) -> int:
        with pytest.raises(ApiError, match="failed on this prompt"):
            await _answer(local, Prompt((99_999,)), SamplingParams())
        assert local.scheduler.failure is None
        return len((await _answer(local, _prompt(0), SamplingParams(max_tokens=3)))[0])

    assert _with(engine, work) == 3


def test_a_failing_prompt_among_others_costs_itself_alone() -> None:
    engine = TableEngine(slots=8)
    engine.packed_tokens = 100
    prompts = [_prompt(0), Prompt((99_999,)), Prompt((1,) * 300), _prompt(1)]

    async def work(local: LocalEngine) -> list[object]:
        calls = (_answer(local, prompt, SamplingParams(max_tokens=3)) for prompt in prompts)
        return await asyncio.gather(*calls, return_exceptions=True)

    found = _with(engine, work)
    assert [type(each) for each in found] == [tuple, ApiError, BadRequest, tuple]
    assert engine.held == {}


def test_a_broken_engine_fails_all_and_refuses_more() -> None:
    class Broken(TableEngine):
        def decode(self, slots: object, tokens: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("device lost")

    async def work(local: LocalEngine) -> list[object]:
        calls = (_answer(local, _prompt(i), SamplingParams(max_tokens=9)) for i in range(6))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert str(local.scheduler.failure) == "device lost"
        with pytest.raises(Unavailable):
            await _answer(local, _prompt(0), SamplingParams())
        return results

    results = _with(Broken(slots=2), work)
    assert [type(r) for r in results] == [Unavailable] * 6


def test_an_error_that_comes_among_tokens_ends_the_answer() -> None:
    async def work() -> list[Step]:
        inbox: asyncio.Queue[Item] = asyncio.Queue()
        for item in (Step(1), Step(2), DeadlineExceeded("late"), Step(3)):
            inbox.put_nowait(item)
        steps: list[Step] = []
        with pytest.raises(DeadlineExceeded):
            async for chunk in chunks_from(inbox, 60):
                steps += chunk.steps
        return steps

    assert [step.token_id for step in asyncio.run(work())] == [1, 2]
