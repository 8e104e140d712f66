"""The Serve replica: HTTP in its own process, each engine in a child process beside it."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from typing import Any

import msgspec

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.artifacts.store import local_folder, read_record
from llava_ray.inference.process.client import EngineProcess
from llava_ray.models.family import family_of
from llava_ray.server import loading
from llava_ray.server.backend import Backend, variant_digest
from llava_ray.server.memory import slots_that_fit
from llava_ray.server.metrics import Recorder
from llava_ray.server.settings import AppArgs, ModelArgs


class Replica:
    """All served models behind one HTTP application."""

    async def __init__(self, args: AppArgs, key_digests: Sequence[str]) -> None:  # type: ignore[misc]
        from llava_ray.server.endpoint import Endpoint

        self._key_digests = key_digests
        self._engines: list[EngineProcess] = []
        slots = await asyncio.to_thread(slots_that_fit, args)
        backends = [await self._open(args, model, slots) for model in args.models]
        self._endpoint = Endpoint(backends, args)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI application; Serve calls this once the constructor is done."""
        return self._endpoint.app(self._key_digests)

    async def check_health(self) -> None:
        """Raise when an engine could not be started again; Serve then replaces the replica."""
        for engine in self._engines:
            engine.check_alive()

    async def __del__(self) -> None:
        """End the engines; Serve has waited for what was under way."""
        for engine in getattr(self, "_engines", []):
            await engine.close()

    async def _open(self, args: AppArgs, model: ModelArgs, slots: int) -> Backend:
        variant = read_record(Variant, model.variant_uri, cached=True)
        # Every file is hashed once on a machine, which takes a while.
        folder = await asyncio.to_thread(local_folder, variant)
        name = model.name or variant.slug
        recorder = Recorder(name)
        engine_args = args.engine_args(model, f"engine {name}", slots)
        engine = EngineProcess(
            engine_args.name,
            loading.__name__,
            engine_args.model_dump_json(),
            step_timeout_s=args.step_timeout_s,
            on_beat=recorder.beat,
            on_loss=recorder.lost,
        )
        self._engines.append(engine)
        # Both take seconds, and neither waits for the other.
        opened, tokenizers = await asyncio.gather(
            engine.start(),
            asyncio.to_thread(import_module, "transformers.models.auto.tokenization_auto"),
        )
        card_uri = model.scorecard_uri
        return Backend(
            name=name,
            slug=variant.slug,
            digest=variant_digest(variant),
            created=int(datetime.fromisoformat(variant.created).timestamp()),
            scorecard=_summary(card_uri) if card_uri else None,
            **msgspec.structs.asdict(opened),
            tokenizer=tokenizers.AutoTokenizer.from_pretrained(folder),
            family=family_of(folder),
            engine=engine,
            recorder=recorder,
        )


def _summary(scorecard_uri: str) -> dict[str, Any]:
    return read_record(Scorecard, scorecard_uri, cached=True).model_dump(
        mode="json",
        include={
            "device", "variant_bytes", "memory_bytes", "prefill_s", "decode_tokens_per_s",
            "kl_divergence", "top1_agreement", "perplexity", "scores",
        },
    )  # fmt: skip
