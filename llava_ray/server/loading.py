"""From a variant's URI to a loaded engine; what a node has once needs the storage no more."""

import logging
import os
import socket
import sys
import time
from pathlib import Path, PurePosixPath

from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import CARD, MANIFEST, PASSPORT, local_folder, read_record
from llava_ray.console import set_up_logging
from llava_ray.errors import ArtifactError
from llava_ray.inference.engine import Engine
from llava_ray.inference.process.child import serve_engine
from llava_ray.models.folder import max_positions
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.crash import crash_recorded
from llava_ray.server.settings import EngineArgs

logger = logging.getLogger(__name__)

_ALLOWED = {".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".md"}
"""Weights that hold numbers only, and text; no pickle, no code."""


def main() -> None:
    """Run as the process of an engine: `python -m llava_ray.server.loading ENGINE_ARGS FD`."""
    args = EngineArgs.model_validate_json(sys.argv[1])
    set_up_logging()
    with crash_recorded(f"{args.name}-{os.getpid()}"):
        serve_engine(lambda: open_variant(args), socket.socket(fileno=int(sys.argv[2])))


def open_variant(args: EngineArgs) -> Engine:
    """Check a variant's files against its manifest and load it.

    Raises ArtifactError when a file differs, or is of a kind that could run code.
    """
    start = time.monotonic()
    variant, folder = verified_variant(args.variant_uri)
    engine = spec_for(variant.slug).open_engine(
        folder,
        device=args.device,
        slots=args.slots,
        context=min(args.context, max_positions(folder)),
    )
    engine.warm_up()
    if args.kept_prefixes:
        engine.keep_prefixes(args.kept_prefixes)
    took = time.monotonic() - start
    logger.info("%s: loaded on %s in %.1f s", variant.slug, args.device, took)
    return engine


def verified_variant(uri: str) -> tuple[Variant, Path]:
    """Return a variant's record and its folder on this machine.

    Raises ArtifactError when a file differs, or is of a kind that could run code.
    """
    variant = read_record(Variant, uri, cached=True)
    folder = local_folder(variant)
    # What the manifest does not name was not checked, so it must not be there to be loaded.
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    extra = sorted(present - set(variant.files) - {MANIFEST, CARD, PASSPORT})
    if extra:
        raise ArtifactError(f"{variant.id}: {extra[0]} is not in the manifest: delete it")
    for name in variant.files:
        if PurePosixPath(name).suffix not in _ALLOWED:
            raise ArtifactError(
                f"{variant.id}: {name} is not served: weights are safetensors or GGUF, beside text"
            )
    return variant, folder


if __name__ == "__main__":
    main()
