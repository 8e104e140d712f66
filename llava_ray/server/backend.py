"""What the web layer asks of an engine, be it in this process or in a Serve replica."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.metrics import Recorder
from llava_ray.inference.sampling import SamplingParams
from llava_ray.inference.scheduler import Chunk, Scheduler


class ModelCard(BaseModel):
    """What clients and the web layer need to know of a served variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    slug: str
    digest: str
    """Over the SHA-256 of all of the variant's files."""
    created: int
    """Seconds since 1970."""
    variant_uri: str
    image_size: int
    tokens_per_image: int
    eos_token_id: int
    context: int
    scorecard: dict[str, Any] | None = None


class Backend(ABC):
    """A served model."""

    card: ModelCard
    tokenizer: Any
    """The Hugging Face tokenizer of the variant's folder."""

    @property
    def image_size(self) -> int:
        """Pixels on a side of what the model sees."""
        return self.card.image_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens that one image takes."""
        return self.card.tokens_per_image

    @abstractmethod
    def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens; leaving the iteration stops the engine.

        Stop strings are the caller's to find. Raises ApiError.
        """

    @abstractmethod
    async def metrics(self) -> list[bytes]:
        """Return each replica's series in Prometheus's text format."""

    @abstractmethod
    async def check(self) -> None:
        """Raise ApiError when no request can be answered."""


class LocalBackend(Backend):
    """An engine in this process."""

    def __init__(
        self, engine: Engine, card: ModelCard, *, max_waiting: int, replica: str = "local"
    ) -> None:
        self.card = card
        self.tokenizer = engine.tokenizer
        self._recorder = Recorder(model=card.name, replica=replica, device=engine.device)
        self.scheduler = Scheduler(engine, max_waiting=max_waiting, recorder=self._recorder)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Yield an answer's tokens."""
        return self.scheduler.stream(prompt, sampling, timeout_s)

    async def metrics(self) -> list[bytes]:
        """Return the engine's series."""
        return [self._recorder.exposition()]

    async def check(self) -> None:
        """Raise Unavailable when the engine broke."""
        self.scheduler.check()


def make_card(
    variant: Variant, engine: Engine, *, name: str | None, scorecard: Scorecard | None
) -> ModelCard:
    """Describe a loaded variant."""
    from datetime import datetime

    entries = sorted((path, entry.sha256) for path, entry in variant.files.items())
    digest = hashlib.sha256("".join(f"{sha} {path}\n" for path, sha in entries).encode())
    return ModelCard(
        name=name or variant.slug,
        slug=variant.slug,
        digest=f"sha256:{digest.hexdigest()}",
        created=int(datetime.fromisoformat(variant.created).timestamp()),
        variant_uri=variant.uri,
        image_size=engine.image_size,
        tokens_per_image=engine.tokens_per_image,
        eos_token_id=engine.eos_token_id,
        context=engine.context,
        scorecard=None if scorecard is None else shown_scorecard(scorecard),
    )


def shown_scorecard(scorecard: Scorecard) -> dict[str, Any]:
    """Return the measurements that clients see; generations and paths are left out."""
    return scorecard.model_dump(
        mode="json",
        include={
            "device",
            "variant_bytes",
            "memory_bytes",
            "prefill_s",
            "decode_tokens_per_s",
            "kl_divergence",
            "top1_agreement",
            "perplexity",
            "scores",
        },
    )
