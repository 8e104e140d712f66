"""How many answers fit beside the weights, from the sizes that the 7B's variants have."""

import json
from pathlib import Path

import pytest

from llava_ray.config.run import ServeConfig
from llava_ray.errors import ResourceError
from llava_ray.models.shapes import LLAVA_7B
from llava_ray.resources.memory import memory_bytes
from llava_ray.server.memory import Footprint, footprint, slots_within

RESULTS = Path(__file__).parents[2] / "jobs" / "results" / "llava_7b_h100.json"
L4_BYTES = int(22.5 * 2**30)
"""What PyTorch sees of a card that is sold as 24 GB."""
SMALL = {
    row["slug"]: row for row in json.loads(RESULTS.read_text())["rows"] if "16" not in row["slug"]
}


class _Measured:
    """As a variant's record, without its files."""

    def __init__(self, slug: str, size_bytes: int) -> None:
        self.slug, self.size_bytes = slug, size_bytes
        self.method = slug.partition("-")[0]
        self.bits_per_weight = SMALL[slug]["bits_per_weight"]


def _footprint(slug: str, device: str = "cuda") -> Footprint:
    variant = _Measured(slug, SMALL[slug]["size_bytes"])
    context = ServeConfig().context
    return footprint(variant, LLAVA_7B["text_config"], device=device, context=context)


@pytest.mark.parametrize("slug", SMALL)
def test_every_4_and_8_bit_variant_of_the_7b_starts_on_24_gb(slug: str) -> None:
    found = slots_within([_footprint(slug)], L4_BYTES, ServeConfig().max_concurrent_requests)
    assert found >= 8


def test_a_winner_and_one_beside_it_share_24_gb() -> None:
    pair = [_footprint("awq-w4-g128"), _footprint("hqq-w4-g64")]
    alone = slots_within(pair[:1], L4_BYTES, 64)
    assert 1 <= slots_within(pair, L4_BYTES, 64) < alone / 2


def test_one_answer_takes_what_its_cache_holds() -> None:
    assert _footprint("awq-w4-g128").per_slot == 2 * 32 * 4096 * 2 * 2048
    assert _footprint("awq-w4-g128", "cpu").per_slot == 2 * 32 * 4096 * 4 * 2048
    assert _footprint("gguf-q4_k_m", "cpu").per_slot == 2 * 32 * 4096 * 2 * 2048
    # A CPU computes with the weights unpacked.
    assert (
        _footprint("awq-w4-g128", "cpu").weights > 25e9 > _footprint("gguf-q4_k_m", "cpu").weights
    )


def test_what_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match=r"awq.*6\.0 GB of memory.*take 7\.\d GB.*answer 1\.1"):
        slots_within([_footprint("awq-w4-g128")], 6e9, 16)


def test_llama_cpp_takes_256_answers_at_most() -> None:
    assert slots_within([_footprint("gguf-q4_k_m", "cpu")], 1e12, 300) == 256
    assert slots_within([_footprint("awq-w4-g128")], 1e12, 300) == 300


def test_this_machine_has_some_memory_free() -> None:
    free, total = memory_bytes("cpu")
    assert 10**8 < free < total
