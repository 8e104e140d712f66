"""An engine of this process that answers as one of a process of its own does."""

import asyncio
from collections.abc import AsyncGenerator, Hashable
from contextlib import aclosing

from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.request_errors import Unavailable
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk, Item, Scheduler, chunks_from


class LocalEngine:
    def __init__(self, engine: Engine) -> None:
        self.scheduler = Scheduler(engine)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float = 60
    ) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Item] = asyncio.Queue()

        def put(items: list[tuple[Hashable, Item]]) -> None:
            for _, item in items:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(inbox.put_nowait, item)

        answer = self.scheduler.submit(prompt, sampling, put)
        try:
            async with aclosing(chunks_from(inbox, timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.scheduler.cancel(answer)

    def check(self) -> None:
        if self.scheduler.failure is not None:
            raise Unavailable("the engine has stopped")
