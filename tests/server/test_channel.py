import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest
from table_engine import TableEngine

from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import generate
from llava_ray.inference.metrics import Recorder
from llava_ray.inference.request_errors import (
    ApiError,
    BadRequest,
    Overloaded,
    Unavailable,
    from_plain,
)
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Scheduler
from llava_ray.server.channel import Address, Line, Uplink, Uplinks
from llava_ray.server.pool import Pool

_TEXT = Prompt((1, 100, 101))
_LONG = SamplingParams(max_tokens=10_000, ignore_eos=True)


@asynccontextmanager
async def _replica(engine: TableEngine, variant: str = "v1") -> AsyncIterator[Uplinks]:
    recorder = Recorder(model="m", replica="r")
    scheduler = Scheduler(engine, max_waiting=64, recorder=recorder)
    scheduler.start()
    uplinks = Uplinks(scheduler, variant)
    try:
        yield uplinks
        await uplinks.leave()
    finally:
        await asyncio.to_thread(scheduler.close)


@asynccontextmanager
async def _ingress(
    *replicas: Uplinks, slots: int = 4, max_waiting: int = 8
) -> AsyncIterator[tuple[Pool, Address]]:
    pool = Pool("v1", slots=slots, max_waiting=max_waiting)
    try:
        address = await pool.open("127.0.0.1")
        for count, replica in enumerate(replicas, start=1):
            await replica.join(address)
            while len(pool._lines) < count:
                await asyncio.sleep(0.001)
        yield pool, address
    finally:
        pool.close()
        # Transports close in the loop's next turns.
        await asyncio.sleep(0.05)


async def _ask(
    pool: Pool, prompt: Prompt = _TEXT, sampling: SamplingParams | None = None
) -> tuple[list[Step], str | None]:
    steps: list[Step] = []
    reason = None
    sampling = sampling or SamplingParams(max_tokens=12, ignore_eos=True)
    async for chunk in pool.stream(prompt, sampling, 10):
        steps += chunk.steps
        reason = chunk.finish_reason
    return steps, reason


def _ends(pool: Pool, replica: Uplinks) -> tuple[Line, Uplink]:
    (line,) = pool._lines
    ((uplink, _),) = replica._open.values()
    return line, uplink


def _run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(main())


def test_an_answer_is_the_one_that_the_engine_gives_alone() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    prompt = Prompt((1, *[TableEngine.image_token_id] * 4, 100), (pixels,))
    sampling = SamplingParams(
        max_tokens=9, temperature=0.7, top_p=0.9, seed=3, stop=("zz",), top_logprobs=2
    )
    alone = list(generate(TableEngine(), prompt, sampling))

    async def work() -> None:
        async with _replica(TableEngine()) as replica, _ingress(replica) as (pool, _):
            steps, reason = await _ask(pool, prompt, sampling)
            assert (steps, reason) == (alone, "length")

    _run(work)


def test_one_moments_tokens_of_all_answers_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = Uplink.send
    monkeypatch.setattr(Uplink, "send", lambda self, data: (writes.append(data), real(self, data)))
    likely = Step(7, -0.25, ((7, -0.25), (8, float("-inf"))))

    async def work() -> None:
        async with _replica(TableEngine()) as replica, _ingress(replica) as (pool, _):
            first, second, left, (line, uplink) = [], [], [], _ends(pool, replica)
            line._answers |= {1: first.append, 2: second.append, 3: left.append}
            line.forget(3)
            uplink._deliver([(1, Step(5)), (2, likely), (3, Step(9)), (1, Step(6)), (1, "stop")])
            while not second:
                await asyncio.sleep(0.001)
            assert first == [Step(5), Step(6), "stop"]
            assert second == [likely]
            assert left == []

    _run(work)
    assert len([data for data in writes if data.startswith(b"[[")]) == 1


def test_the_least_busy_replica_is_asked_and_a_full_queue_refuses() -> None:
    first, second = (TableEngine(slots=2, context=100_000) for _ in range(2))

    async def work() -> None:
        async with (
            _replica(first) as one,
            _replica(second) as two,
            _ingress(one, two, slots=2, max_waiting=1) as (pool, _),
        ):
            long = [asyncio.create_task(_ask(pool, sampling=_LONG)) for _ in range(4)]
            while one.answers + two.answers < 4:
                await asyncio.sleep(0.001)
            assert (one.answers, two.answers) == (2, 2)
            waits = asyncio.create_task(_ask(pool))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded, match="1 requests wait"):
                await _ask(pool)
            long[0].cancel()
            steps, reason = await waits
            assert (len(steps), reason) == (12, "length")
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)

    _run(work)


def test_leaving_a_stream_stops_the_engine_and_gives_the_slot_back() -> None:
    engine = TableEngine(slots=1, context=100_000)

    async def work() -> None:
        async with _replica(engine) as replica, _ingress(replica, slots=1) as (pool, _):
            async with aclosing(pool.stream(_TEXT, _LONG, 10)) as chunks:
                await anext(chunks)
            assert (await _ask(pool))[1] == "length"
            assert engine.held == {}

    _run(work)


def test_the_engines_refusal_arrives_as_it_was() -> None:
    async def work() -> None:
        async with _replica(TableEngine(context=4)) as replica, _ingress(replica) as (pool, _):
            with pytest.raises(BadRequest) as refusal:
                await _ask(pool, Prompt((1,) * 9))
            assert refusal.value.code == "context_length_exceeded"
            assert replica.answers == 0

    _run(work)
    error = Overloaded("full", "n", None)
    assert from_plain(error.plain()).envelope() == error.envelope()


def test_a_lost_replicas_waiting_requests_go_to_another_and_begun_ones_fail() -> None:
    engine = TableEngine(slots=1, context=100_000)

    async def work() -> None:
        async with (
            _replica(engine) as one,
            _replica(TableEngine()) as two,
            _ingress(one, slots=2, max_waiting=0) as (pool, address),
        ):
            begun = pool.stream(_TEXT, _LONG, 10)
            await anext(begun)
            waits = asyncio.create_task(_ask(pool))
            while one.answers < 2:
                await asyncio.sleep(0.001)
            for uplink, _ in one._open.values():
                uplink._close()
            while not pool.waiting:
                await asyncio.sleep(0.001)
            await two.join(address)
            steps, reason = await waits
            assert (len(steps), reason) == (12, "length")
            with pytest.raises(Unavailable) as failure:
                async for _ in begun:
                    pass
            assert failure.value.code == "engine_lost"

    _run(work)


def test_a_replica_that_leaves_ends_what_it_has_and_is_asked_no_more() -> None:
    async def work() -> None:
        async with (
            _replica(TableEngine(slots=1, context=100_000)) as one,
            _replica(TableEngine(slots=1)) as two,
            _ingress(one) as (pool, address),
        ):
            many = SamplingParams(max_tokens=2000, ignore_eos=True)
            long = asyncio.create_task(_ask(pool, sampling=many))
            while not one.answers:
                await asyncio.sleep(0.001)
            leaving = asyncio.create_task(one.leave())
            while not pool.empty:
                await asyncio.sleep(0.001)
            waits = asyncio.create_task(_ask(pool))
            await two.join(address)
            assert (await waits)[1] == "length"
            assert len((await long)[0]) == 2000
            await leaving
            await one.join(address)
            assert len(pool._lines) == 1

    _run(work)


def test_another_variants_replica_is_asked_only_while_there_is_no_other() -> None:
    old, new = TableEngine(), TableEngine()

    async def work() -> None:
        async with (
            _replica(old, "v0") as one,
            _replica(new, "v1") as two,
            _ingress(one) as (pool, address),
        ):
            await _ask(pool)
            await two.join(address)
            while len(pool._lines) < 2:
                await asyncio.sleep(0.001)
            await asyncio.gather(*(_ask(pool) for _ in range(3)))
            assert (old.prefills, new.prefills) == (1, 3)

    _run(work)


def test_an_ingress_that_reads_slowly_gets_all_in_order() -> None:
    engine = TableEngine(slots=1, context=100_000)
    sampling = SamplingParams(max_tokens=800, ignore_eos=True, top_logprobs=20)

    async def work() -> None:
        async with _replica(engine) as replica, _ingress(replica, slots=1) as (pool, _):
            line, uplink = _ends(pool, replica)
            ingress = pool._lines[line]
            for end, buffer in ((ingress, socket.SO_RCVBUF), (uplink._writer, socket.SO_SNDBUF)):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 65536)
            ingress.transport.pause_reading()
            asked = asyncio.create_task(_ask(pool, sampling=sampling))
            while uplink._direct is not None:
                await asyncio.sleep(0.01)
            ingress.transport.resume_reading()
            steps, reason = await asked
            alone = [s.token_id for s in generate(TableEngine(context=100_000), _TEXT, sampling)]
            assert [step.token_id for step in steps] == alone
            assert reason == "length"

    _run(work)


def test_who_does_not_know_the_secret_is_not_heard() -> None:
    async def work() -> None:
        async with _ingress() as (pool, address):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"0" * len(address.secret) + b'"v1"\n')
            assert await reader.read() == b""
            writer.close()
            assert pool.empty

    _run(work)


def test_a_replica_joins_once_and_again_when_the_connection_is_lost() -> None:
    async def work() -> None:
        async with _replica(TableEngine()) as replica, _ingress(replica) as (pool, address):
            await asyncio.gather(*(replica.join(address) for _ in range(5)))
            first, uplink = _ends(pool, replica)
            # In the middle of a line, as when its process is killed.
            uplink.send(b"[[0,[[")
            uplink._close()
            while not pool.empty:
                await asyncio.sleep(0.001)
            while pool.empty:
                await replica.join(address)
                await asyncio.sleep(0.001)
            assert first not in pool._lines

    _run(work)


def test_a_machine_that_vanishes_is_noticed_at_both_ends() -> None:
    async def work() -> None:
        async with _replica(TableEngine()) as replica, _ingress(replica) as (pool, _):
            _, uplink = _ends(pool, replica)
            for end in (uplink._writer, *pool._lines.values()):
                found = end.get_extra_info("socket")
                assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                silence_ms = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert 1000 <= silence_ms <= 30_000

    _run(work)


def test_an_ingress_that_is_gone_is_unavailable() -> None:
    async def work() -> None:
        async with _replica(TableEngine()) as replica, _ingress() as (pool, address):
            pool.close()
            with pytest.raises(ApiError, match="cannot be reached"):
                await replica.join(address)

    _run(work)
