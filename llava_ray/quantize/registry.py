"""From slugs to specs. A new method adds one import and one entry."""

import difflib

from llava_ray.errors import ConfigError
from llava_ray.quantize.awq import AwqSpec
from llava_ray.quantize.bnb import BnbSpec
from llava_ray.quantize.gguf import GgufSpec
from llava_ray.quantize.gguf_imatrix import GgufImatrixSpec
from llava_ray.quantize.hqq import HqqSpec
from llava_ray.quantize.none import NoneSpec
from llava_ray.quantize.spec import QuantizationSpec

METHODS: tuple[type[QuantizationSpec], ...] = (
    NoneSpec,
    BnbSpec,
    HqqSpec,
    GgufSpec,
    GgufImatrixSpec,
    AwqSpec,
)


def known_slugs() -> list[str]:
    """Return every slug worth listing."""
    return [slug for method in METHODS for slug in method.known_slugs]


def spec_for(slug: str) -> QuantizationSpec:
    """Return the spec of a slug.

    Raises ConfigError that names the nearest known slug.
    """
    for method in METHODS:
        spec = method.parse(slug)
        if spec is not None:
            return spec
    near = difflib.get_close_matches(slug, known_slugs(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown variant {slug!r}: {hint}'llava-ray quantize --list' names all")
