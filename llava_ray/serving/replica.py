"""The two kinds of Serve replicas: engines, and the ingress that speaks HTTP before them.

They are apart so that image decoding never waits for the engine's Python, one ingress serves many
variants, and an engine that dies takes no answer with it that had not begun.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from llava_ray.serving.api_errors import ApiError, Overloaded, Unavailable
from llava_ray.serving.backend import Backend, LocalBackend, ModelCard
from llava_ray.serving.channel import Address, Receiver, Senders
from llava_ray.serving.engine import Prompt
from llava_ray.serving.generate import FinishReason
from llava_ray.serving.sampling import SamplingParams, Step
from llava_ray.serving.scheduler import Chunk
from llava_ray.serving.settings import AppArgs, ModelArgs

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
"""Replicas that a request which has not begun is offered to."""
_CONNECT_PAUSE_S = 0.5
_END_TIMEOUT_S = 5


class EngineReplica:
    """One loaded variant; answers come as streams of tokens."""

    async def __init__(self, model: ModelArgs, args: AppArgs) -> None:  # type: ignore[misc]
        from ray import serve

        from llava_ray.serving.loading import open_variant

        engine, card = await asyncio.to_thread(open_variant, model, args)
        replica = serve.get_replica_context().replica_tag
        # Serve's router queues; what gets here has a slot, or its siblings of one request do.
        waiting = args.max_concurrent_requests * args.max_choices
        self._backend = LocalBackend(engine, card, max_waiting=waiting, replica=replica)
        self._backend.scheduler.start(asyncio.get_running_loop())
        self._senders = Senders()

    async def card(self) -> ModelCard:
        """Describe the variant."""
        return self._backend.card

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        timeout_s: float,
        address: Address,
        number: int,
    ) -> None:
        """Send an answer's tokens to the ingress; return once it has ended, raise if it failed."""
        sender = await self._senders.to(address)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def deliver(item: Step | FinishReason | ApiError) -> None:
            if over.done():
                return
            if isinstance(item, ApiError):
                over.set_exception(item)
            elif sender.closed:
                over.set_exception(Unavailable("the ingress is gone"))
            else:
                sender.put(number, item)
                if isinstance(item, str):
                    over.set_result(None)

        answer = self._backend.scheduler.submit(prompt, sampling, timeout_s, deliver)
        try:
            await over
        finally:
            self._backend.scheduler.cancel(answer)

    async def metrics(self) -> bytes:
        """Return this replica's series."""
        return (await self._backend.metrics())[0]

    async def check_health(self) -> None:
        """Raise when the engine broke; Serve then replaces the replica."""
        await self._backend.check()

    async def __del__(self) -> None:
        """End the engine's thread and free its memory."""
        if hasattr(self, "_senders"):
            self._senders.close()
        if hasattr(self, "_backend"):
            await asyncio.to_thread(self._backend.scheduler.close)


class Ingress:
    """The HTTP side of the application."""

    async def __init__(  # type: ignore[misc]
        self, args: AppArgs, key_digests: Sequence[str], engines: Sequence[Any]
    ) -> None:
        from ray.util import get_node_ip_address

        from llava_ray.serving.endpoint import Endpoint

        self._receiver = Receiver()
        host: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        address = await self._receiver.open(host)
        backends = [
            await RayBackend.connect(model, handle, self._receiver, address)
            for model, handle in zip(args.models, engines, strict=True)
        ]
        self._endpoint = Endpoint(backends, args)
        self._key_digests = key_digests

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI application; Serve calls this once the constructor is done."""
        return self._endpoint.app(self._key_digests)


class RayBackend(Backend):
    """An engine in Serve replicas of their own."""

    def __init__(
        self, handle: Any, card: ModelCard, tokenizer: Any, receiver: Receiver, address: Address
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self._handle = handle
        self._receiver = receiver
        self._address = address
        self._calls: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(
        cls, model: ModelArgs, handle: Any, receiver: Receiver, address: Address
    ) -> "RayBackend":
        """Wait for a replica that has this variant; in an upgrade the first to answer may not."""
        from transformers import AutoTokenizer

        from llava_ray.serving.loading import tokenizer_folder

        while True:
            card: ModelCard = await handle.card.remote()
            if card.variant_uri == model.variant_uri:
                break
            await asyncio.sleep(_CONNECT_PAUSE_S)
        folder = await asyncio.to_thread(tokenizer_folder, model.variant_uri)
        return cls(handle, card, AutoTokenizer.from_pretrained(folder), receiver, address)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; a replica lost before the first is replaced by another."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        deadline = time.monotonic() + timeout_s
        for attempt in range(1, _ATTEMPTS + 1):
            begun = False
            chunks = self._attempt(prompt, sampling, deadline - time.monotonic())
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except BackPressureError as error:
                raise Overloaded(f"{error.message} Try again later.") from error
            except DeploymentUnavailableError as error:
                raise Unavailable("the model failed to start: see /health") from error
            except (RayTaskError, RayActorError, Unavailable) as error:
                failure = _failure(error)
                if begun or attempt == _ATTEMPTS or not isinstance(failure, Unavailable):
                    raise failure from error
                logger.warning("a replica was lost, the request goes to another: %s", failure)

    async def _attempt(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens from one replica; what came meanwhile comes together."""
        inbox: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        number = self._receiver.expect(inbox.put_nowait)
        response = self._handle.generate.remote(prompt, sampling, timeout_s, self._address, number)
        call = asyncio.create_task(_await(response))
        call.add_done_callback(lambda done: inbox.put_nowait(_outcome(done)))
        # The loop itself does not keep a task that nobody waits for.
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        returned = ended = False
        try:
            while True:
                # The end comes over the channel; once the call has returned it is due.
                async with asyncio.timeout(_END_TIMEOUT_S if returned else None):
                    items = [await inbox.get()]
                while not inbox.empty():
                    items.append(inbox.get_nowait())
                chunks = [item for item in items if isinstance(item, Chunk)]
                if chunks:
                    steps = tuple(step for chunk in chunks for step in chunk.steps)
                    ended = chunks[-1].finish_reason is not None
                    yield Chunk(steps, chunks[-1].finish_reason)
                    if ended:
                        return
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
                returned = returned or None in items
        except TimeoutError as error:
            raise _lost() from error
        finally:
            self._receiver.forget(number)
            if not ended:
                response.cancel()
                call.cancel()

    async def metrics(self) -> list[bytes]:
        """Return each replica's series."""
        found = self._handle.broadcast("metrics")
        return list(await found.results_async())

    async def check(self) -> None:
        """Raise Unavailable when no replica answers."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            await asyncio.wait_for(_card_of(self._handle), timeout=5)
        except (TimeoutError, RayError, RayServeException) as error:
            raise Unavailable(f"{self.card.name}: no replica answers") from error


def _failure(error: Exception) -> Exception:
    """Return what a failed call means to the client."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, Exception):
        return error
    return error if isinstance(error, Unavailable) else _lost()


def _lost() -> Unavailable:
    return Unavailable("the engine was lost before the answer ended", code="engine_lost")


async def _await(response: Any) -> None:
    await response


def _outcome(call: "asyncio.Task[None]") -> BaseException | None:
    """Return what a Serve call failed with."""
    return _lost() if call.cancelled() else call.exception()


async def _card_of(handle: Any) -> ModelCard:
    card: ModelCard = await handle.card.remote()
    return card
