"""How many answers at a time a replica's memory has room for, beside its models' weights.

The deploy stage computes limits by it before anything starts, and each replica checks it against
what is free.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.artifacts.node import kept_text
from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import read_record
from llava_ray.errors import ResourceError
from llava_ray.inference.llama_cpp import MAX_SEQUENCES
from llava_ray.resources.memory import memory_bytes
from llava_ray.server.settings import AppArgs

_GIB = 1024**3
_RESERVE = {"cuda": 3 * _GIB // 2, "cpu": _GIB}
"""Of each model's process: libraries, the device's context, workspace of a prefill."""
_USABLE = 0.95
"""The allocator's unused pieces take the rest."""


@dataclass(frozen=True)
class Footprint:
    """What one served model takes."""

    slug: str
    weights: int
    """Bytes of its weights and of its process."""
    per_slot: int
    """Bytes of the KV cache of one answer."""
    most: int | None = None
    """What its engine takes at a time at most."""


def footprint(
    variant: Variant, text_config: Mapping[str, Any], *, device: str, context: int
) -> Footprint:
    """Compute what a variant takes on a device (`cpu` or `cuda`), from its record and shapes."""
    # PyTorch computes in fp32 on a CPU, and unpacks all weights for it.
    unpacked = device == "cpu" and variant.method != "gguf"
    bits = variant.bits_per_weight
    heads = text_config["num_attention_heads"]
    head_dim = text_config.get("head_dim") or text_config["hidden_size"] // heads
    kv_heads = text_config.get("num_key_value_heads", heads)
    values = 2 * text_config["num_hidden_layers"] * kv_heads * head_dim
    tokens = min(context, text_config.get("max_position_embeddings", context))
    per_slot = values * tokens * (4 if unpacked or bits == 32 else 2)
    weights = int(variant.size_bytes * (32 / bits if unpacked else 1)) + _RESERVE[device]
    # On a GPU PyTorch's engine has a spare slot.
    spare = per_slot if device == "cuda" and variant.method != "gguf" else 0
    most = MAX_SEQUENCES if variant.method == "gguf" else None
    return Footprint(variant.slug, weights + spare, per_slot, most)


def slots_within(footprints: Sequence[Footprint], memory_bytes: float, wanted: int) -> int:
    """Return the answers of each model that memory has room for at a time, `wanted` at most.

    Raises ResourceError with the numbers where it is less than one.
    """
    weights = sum(each.weights for each in footprints)
    per_slot = sum(each.per_slot for each in footprints)
    wanted = min(wanted, *(each.most for each in footprints if each.most), wanted)
    found = min(wanted, int((memory_bytes * _USABLE - weights) // per_slot))
    if found < 1:
        names = ", ".join(each.slug for each in footprints)
        raise ResourceError(
            f"{names}: {memory_bytes / 1e9:.1f} GB of memory can be had, and weights and workspace "
            f"take {weights / 1e9:.1f} GB and one answer {per_slot / 1e9:.1f}: lower "
            "serve.context, serve fewer variants or use a larger device"
        )
    return found


def slots_that_fit(args: AppArgs, there: int | None = None) -> int:
    """Return the answers of each model that a replica works on at a time.

    there: bytes of the device that it will have; default: what is free on this machine. Raises
    ResourceError where there is no room for one.
    """
    device = "cuda" if args.gpus_per_replica else "cpu"
    footprints = []
    for model in args.models:
        variant = read_record(Variant, model.variant_uri, cached=True)
        text = json.loads(kept_text(model.variant_uri, "config.json") or "{}")["text_config"]
        footprints.append(footprint(variant, text, device=device, context=args.context))
    free, total = memory_bytes(device) if there is None else (there, there)
    share = min(1.0, args.gpus_per_replica or 1.0)
    return slots_within(footprints, min(free, total * share), args.max_concurrent_requests)
