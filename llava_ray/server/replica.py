"""The two kinds of Serve replicas: engines, and the ingress that speaks HTTP before them.

They are apart so that image decoding never waits for the engine's Python, one ingress serves many
variants, and an engine that dies takes no answer with it that had not started. Requests and tokens
pass between them beside Serve (channel.py); Serve's own calls are for the rest.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from llava_ray.inference.engine import Prompt
from llava_ray.inference.metrics import queue_exposition
from llava_ray.inference.request_errors import Overloaded, Unavailable
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk
from llava_ray.server.autoscaling import ANSWERS
from llava_ray.server.backend import Backend, LocalBackend, ModelCard
from llava_ray.server.channel import Address, Uplinks
from llava_ray.server.pool import Pool
from llava_ray.server.settings import AppArgs, ModelArgs

logger = logging.getLogger(__name__)

_CONNECT_PAUSE_S = 0.5
_JOIN_EVERY_S = 2
"""How often the ingress looks for new replicas."""
_CALL_TIMEOUT_S = 5


class EngineReplica:
    """One loaded variant; answers come as streams of tokens."""

    async def __init__(self, model: ModelArgs, args: AppArgs) -> None:  # type: ignore[misc]
        from ray import serve

        from llava_ray.server.crashes import engine_name, record_crashes
        from llava_ray.server.loading import open_variant

        record_crashes(engine_name(model.name or model.variant_uri))
        engine, card = await asyncio.to_thread(open_variant, model, args)
        replica = serve.get_replica_context().replica_tag
        # The ingress queues; what gets here has a slot, or its siblings of one request do.
        waiting = args.max_concurrent_requests * args.max_choices
        self._backend = LocalBackend(engine, card, max_waiting=waiting, replica=replica)
        self._backend.scheduler.start()
        self._uplinks = Uplinks(self._backend.scheduler, card.variant_uri)

    async def card(self) -> ModelCard:
        """Describe the variant."""
        return self._backend.card

    async def join(self, address: Address) -> None:
        """Take requests from an ingress, until it or this replica ends."""
        await self._uplinks.join(address)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve's autoscaler what it cannot see: the answers that are under way."""
        return {ANSWERS: float(self._uplinks.answers)}

    async def metrics(self) -> bytes:
        """Return this replica's series."""
        return (await self._backend.metrics())[0]

    async def check_health(self) -> None:
        """Raise when the engine broke; Serve then replaces the replica."""
        await self._backend.check()

    async def __del__(self) -> None:
        """Finish all answers, then end the engine's thread and free its memory."""
        if hasattr(self, "_uplinks"):
            await self._uplinks.leave()
        if hasattr(self, "_backend"):
            await asyncio.to_thread(self._backend.scheduler.close)


class Ingress:
    """The HTTP side of the application."""

    async def __init__(  # type: ignore[misc]
        self, args: AppArgs, key_digests: Sequence[str], engines: Sequence[Any]
    ) -> None:
        from ray.util import get_node_ip_address

        from llava_ray.server.endpoint import Endpoint

        host: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        backends = [
            await RayBackend.connect(model, args, handle, host)
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
        self, handle: Any, card: ModelCard, tokenizer: Any, pool: Pool, address: Address
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self._handle = handle
        self._pool = pool
        self._address = address
        self._looking = asyncio.create_task(self._look())

    @classmethod
    async def connect(cls, model: ModelArgs, args: AppArgs, handle: Any, host: str) -> "RayBackend":
        """Wait for a replica that has this variant; in an upgrade the first to answer may not."""
        from transformers import AutoTokenizer

        from llava_ray.server.loading import tokenizer_folder

        while True:
            card = await _card_of(handle)
            if card.variant_uri == model.variant_uri:
                break
            await asyncio.sleep(_CONNECT_PAUSE_S)
        folder = await asyncio.to_thread(tokenizer_folder, model.variant_uri)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        slots, waiting = args.max_concurrent_requests, args.max_queued_requests
        pool = Pool(model.variant_uri, slots=slots, max_waiting=waiting)
        backend = cls(handle, card, tokenizer, pool, await pool.open(host))
        await backend._join()
        return backend

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; a replica lost before the first is replaced by another."""
        if self._pool.empty:
            await self._await_replica()
        async with aclosing(self._pool.stream(prompt, sampling, timeout_s)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _await_replica(self) -> None:
        """Wait for a replica as Serve's own calls do.

        Raises Unavailable where none can start, Overloaded where too many wait already.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        try:
            await _card_of(self._handle)
        except BackPressureError as error:
            raise Overloaded(f"{error.message} Try again later.") from error
        except DeploymentUnavailableError as error:
            raise Unavailable("the model failed to start: see /health") from error
        except RayError as error:
            logger.warning("a replica was lost: %s", error)
        await self._join()

    async def _look(self) -> None:
        """Ask replicas that Serve has added to join."""
        while True:
            await asyncio.sleep(_JOIN_EVERY_S)
            try:
                await self._join()
            except Exception:
                # Without this task no new replica would ever be asked anything.
                logger.exception("looking for replicas failed; it goes on")

    async def _join(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            call = self._handle.broadcast("join", self._address)
            # One that cannot be asked now may be by the next time.
            await call.results_async(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("%s: no replica can be asked to join (%s)", self.card.name, error)

    async def metrics(self) -> list[bytes]:
        """Return each replica's series, and the queue's before them."""
        found = self._handle.broadcast("metrics")
        replicas = await found.results_async()
        return [queue_exposition(self.card.name, self._pool.waiting), *replicas]

    async def check(self) -> None:
        """Raise Unavailable when no replica answers."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            await asyncio.wait_for(_card_of(self._handle), _CALL_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException) as error:
            raise Unavailable(f"{self.card.name}: no replica answers") from error


async def _card_of(handle: Any) -> ModelCard:
    card: ModelCard = await handle.card.remote()
    return card
