"""llama.cpp's file types by name, and what each costs in bits.

The list is that of the gguf package, so a newer one brings newer types.
"""

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

PREFIX = "gguf-"

PLAIN = ("f32", "f16", "bf16")
"""Types that are written, not quantized."""

NEEDS_IMATRIX = (
    "q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs",
)  # fmt: skip
"""Types that llama.cpp refuses to write without an importance matrix.

Source: llama.cpp, src/llama-quant.cpp, tensor_requires_imatrix.
"""

_NOT_FOR_LLAVA = {
    "GUESSED",  # no type, but a mark of older files
    "MOSTLY_MXFP4_MOE",  # packs experts, which LLaVA lacks: all comes out as Q8_0
    "MOSTLY_NVFP4",  # llama_model_quantize refuses to write it
}

FILE_TYPES: dict[str, int] = {
    member.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): member.value
    for member in LlamaFileType
    if member.name not in _NOT_FOR_LLAVA
}
"""llama_ftype by name: `q4_k_m`, `iq3_xxs`, `f16`, ..."""

# Where a mixture's name is not that of its main tensor type.
_MAIN_TYPE = {"iq2_m": "IQ2_S", "iq2_s": "IQ2_XS", "iq3_xs": "IQ3_XXS", "iq3_m": "IQ3_S"}

# Mixtures give some layers more bits than their main type has. These are the types that
# llama_model_quantize chose for 32 layers, weighed by the shapes of LLaVA-1.5-7B.
_MIXTURE_BITS = {
    "q2_k": 2.941, "q2_k_s": 2.677, "q3_k_m": 3.869, "q3_k_l": 4.239, "q4_k_s": 4.538,
    "q4_k_m": 4.815, "q5_k_m": 5.662, "iq1_s": 1.722, "iq1_m": 1.873, "iq2_xxs": 2.125,
    "iq2_xs": 2.347, "iq2_s": 2.530, "iq2_m": 2.732, "iq3_xxs": 3.011, "iq3_xs": 3.250,
    "iq3_m": 3.643, "iq4_nl": 4.528, "iq4_xs": 4.285,
}  # fmt: skip


def main_type(name: str) -> GGMLQuantizationType:
    """Return the type that most of a file type's linear layers have."""
    wanted = _MAIN_TYPE.get(name, name.upper())
    if wanted not in GGMLQuantizationType.__members__:
        wanted = wanted.rsplit("_", 1)[0]
    return GGMLQuantizationType[wanted]


def bits_of(tensor_type: GGMLQuantizationType) -> float:
    """Return the bits that one weight takes, scales counted in."""
    weights, size_bytes = GGML_QUANT_SIZES[tensor_type]
    return 8 * size_bytes / weights


def expected_bits(name: str) -> float:
    """Return the mean bits of a linear's weight in LLaVA-1.5-7B; other depths differ a little."""
    return _MIXTURE_BITS.get(name, bits_of(main_type(name)))


def head_bits(name: str) -> float:
    """Return the bits of the head's weights: llama.cpp gives them Q6_K, or better."""
    return max(bits_of(main_type(name)), bits_of(GGMLQuantizationType.Q6_K))
