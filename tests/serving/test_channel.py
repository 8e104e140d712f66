import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llava_ray.serving.api_errors import Unavailable
from llava_ray.serving.channel import Address, Receiver, Sender, Senders
from llava_ray.serving.sampling import Step
from llava_ray.serving.scheduler import Chunk


def _with(work: Callable[[Receiver, Address, Senders], Awaitable[None]]) -> None:
    async def main() -> None:
        receiver, senders = Receiver(), Senders()
        try:
            await work(receiver, await receiver.open("127.0.0.1"), senders)
        finally:
            senders.close()
            receiver.close()
            # Transports close in the loop's next turns.
            await asyncio.sleep(0.05)

    asyncio.run(main())


def test_one_moments_tokens_of_all_answers_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []

    async def work(receiver: Receiver, address: Address, senders: Senders) -> None:
        first: asyncio.Queue[Chunk] = asyncio.Queue()
        second: asyncio.Queue[Chunk] = asyncio.Queue()
        numbers = [receiver.expect(queue.put_nowait) for queue in (first, second)]
        sender = await senders.to(address)
        real = sender._writer.write
        monkeypatch.setattr(sender._writer, "write", lambda data: (writes.append(data), real(data)))
        likely = Step(7, -0.25, ((7, -0.25), (8, float("-inf"))))
        sender.put(numbers[0], Step(5))
        sender.put(numbers[1], likely)
        sender.put(numbers[0], Step(6))
        sender.put(numbers[0], "stop")
        assert await first.get() == Chunk((Step(5), Step(6)), "stop")
        assert await second.get() == Chunk((likely,))

    _with(work)
    assert len(writes) == 1


def test_what_nobody_waits_for_any_more_is_dropped() -> None:
    async def work(receiver: Receiver, address: Address, senders: Senders) -> None:
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        left = receiver.expect(chunks.put_nowait)
        receiver.forget(left)
        kept = receiver.expect(chunks.put_nowait)
        sender = await senders.to(address)
        sender.put(left, Step(1))
        sender.put(kept, Step(2))
        assert await chunks.get() == Chunk((Step(2),))
        assert chunks.empty()

    _with(work)


def test_who_does_not_know_the_secret_is_not_heard() -> None:
    async def work(receiver: Receiver, address: Address, senders: Senders) -> None:
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        number = receiver.expect(chunks.put_nowait)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"0" * len(address.secret) + f'[[{number},[[1]],"stop"]]\n'.encode())
        assert await reader.read() == b""
        writer.close()
        assert chunks.empty()

    _with(work)


def test_a_replica_keeps_one_connection_and_makes_another_when_it_is_lost() -> None:
    async def work(receiver: Receiver, address: Address, senders: Senders) -> None:
        found: list[Sender] = await asyncio.gather(*(senders.to(address) for _ in range(5)))
        assert len(set(found)) == 1
        found[0].close()
        assert found[0].closed
        again = await senders.to(address)
        assert again is not found[0] and not again.closed

    _with(work)


def test_an_ingress_that_is_gone_is_unavailable() -> None:
    async def work(receiver: Receiver, address: Address, senders: Senders) -> None:
        receiver.close()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await senders.to(address)

    _with(work)
