"""A served model, as the web layer sees it."""

import hashlib
from dataclasses import dataclass
from typing import Any

from llava_ray.artifacts.records import Variant
from llava_ray.inference.process.client import EngineProcess
from llava_ray.models.family import Family
from llava_ray.server.metrics import Recorder


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A served model."""

    name: str
    slug: str
    digest: str
    """Over the SHA-256 of all of the variant's files."""
    created: int
    """Seconds since 1970."""
    scorecard: dict[str, Any] | None
    """What clients are shown of it."""
    eos_token_id: int
    context: int
    slots: int
    """Answers that are worked on at a time."""
    tokenizer: Any
    """The Hugging Face tokenizer of the variant's folder."""
    family: Family
    engine: EngineProcess
    recorder: Recorder


def variant_digest(variant: Variant) -> str:
    """Return what names a variant's files, whatever it is called."""
    entries = sorted((path, entry.sha256) for path, entry in variant.files.items())
    digest = hashlib.sha256("".join(f"{sha} {path}\n" for path, sha in entries).encode())
    return f"sha256:{digest.hexdigest()}"
