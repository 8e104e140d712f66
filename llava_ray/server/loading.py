"""From a variant's URI to a loaded engine, having checked every byte of it first."""

import logging
import time
from pathlib import Path, PurePosixPath

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.artifacts.store import CARD, MANIFEST, local_folder, read_record, sha256_of, verify
from llava_ray.errors import ArtifactError
from llava_ray.inference.engine import Engine
from llava_ray.quantize.registry import spec_for
from llava_ray.server.backend import ModelCard, make_card
from llava_ray.server.settings import AppArgs, ModelArgs

logger = logging.getLogger(__name__)

_TEXT = {".json", ".jinja", ".model", ".txt", ".md"}
_ALLOWED = {".safetensors", ".gguf", *_TEXT}
"""Weights that hold numbers only, and text; no pickle, no code."""


def open_variant(model: ModelArgs, args: AppArgs) -> tuple[Engine, ModelCard]:
    """Check a variant's files against its manifest and load it.

    Raises ArtifactError when a file differs, or is of a kind that could run code.
    """
    start = time.monotonic()
    variant, folder = verified_variant(model.variant_uri)
    device = "cuda" if model.gpus_per_replica > 0 else "cpu"
    engine = spec_for(variant.slug).open_engine(
        folder,
        device=device,
        slots=args.max_concurrent_requests,
        context=min(args.context, _model_context(folder)),
    )
    engine.warm_up()
    if args.kept_prefixes:
        engine.keep_prefixes(args.kept_prefixes)
    card_uri = model.scorecard_uri
    scorecard = read_record(Scorecard, card_uri) if card_uri else None
    took = time.monotonic() - start
    logger.info("%s: loaded on %s in %.1f s", variant.slug, device, took)
    return engine, make_card(variant, engine, name=model.name, scorecard=scorecard)


def verified_variant(uri: str) -> tuple[Variant, Path]:
    """Return a variant's record and its folder on this machine, every file hashed.

    Raises ArtifactError when a file differs, or is of a kind that could run code.
    """
    variant = read_record(Variant, uri)
    folder = local_folder(variant)
    verify(variant, folder)
    # What the manifest does not name was not checked, so it must not be there to be loaded.
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    extra = sorted(present - set(variant.files) - {MANIFEST, CARD})
    if extra:
        raise ArtifactError(f"{variant.id}: {extra[0]} is not in the manifest: delete it")
    for name in variant.files:
        if PurePosixPath(name).suffix not in _ALLOWED:
            raise ArtifactError(
                f"{variant.id}: {name} is not served: weights are safetensors or GGUF, beside text"
            )
    return variant, folder


def tokenizer_folder(uri: str) -> Path:
    """Return a variant's folder, its text files hashed: what the ingress needs of it.

    Raises ArtifactError when a file differs from the manifest.
    """
    variant = read_record(Variant, uri)
    folder = local_folder(variant)
    for name, entry in variant.files.items():
        if PurePosixPath(name).suffix in _TEXT and sha256_of(folder / name) != entry.sha256:
            raise ArtifactError(f"{variant.id}: {name} differs from the manifest at {folder}")
    return folder


def _model_context(folder: Path) -> int:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["text_config"].get("max_position_embeddings", 2**31))
