"""A frozen base in HQQ's low bits, under LoRA that recovers what rounding lost.

Source: HQQ+ (https://mobiusml.github.io/1bit_blog). transformers' HqqConfig raises
NotImplementedError, so hqq's own layers are put in; peft knows them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llava_ray.config.train import LINEAR_LAYERS
from llava_ray.errors import ConfigError


def quantize_base(llava: Any, *, bits: int, group_size: int) -> None:
    """Put an HQQLinear in the place of each linear layer of the language model.

    Raises ConfigError when a layer's weights cannot be split into such groups.
    """
    for name, _, layer in _packed(llava, bits, group_size):
        llava.set_submodule(name, layer)


def fake_quantize_base(llava: Any, *, bits: int, group_size: int) -> None:
    """Replace each linear weight of the language model by what its HQQLinear multiplies by."""
    for _, weight, layer in _packed(llava, bits, group_size):
        weight.copy_(layer.dequantize())


def hqq_linear(name: str, weight: Any, *, bits: int, group_size: int) -> Any:
    """Return an HQQLinear of a weight [out, in], quantized along its rows.

    Raises ValueError, with the layer's name, where groups do not divide the weight.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    check_groups(name, weight.shape, bits=bits, group_size=group_size)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return HQQLinear.from_weights(
        weight, None, config, compute_dtype=weight.dtype, device=str(weight.device)
    )


def check_groups(name: str, shape: Sequence[int], *, bits: int, group_size: int) -> None:
    """Raise ValueError where HQQ's groups do not divide a weight [out, in]."""
    rows, columns = shape
    per_byte = 1 if bits == 3 else 8 // bits
    if columns % group_size or (rows * columns // group_size) % per_byte:
        raise ValueError(
            f"{name} is {rows}x{columns}, which groups of {group_size} weights at {bits} bits do "
            f"not divide: {'use a smaller group' if group_size > 16 else 'HQQ has no smaller ones'}"
        )


def _packed(llava: Any, bits: int, group_size: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, weight and HQQLinear of each linear layer of the language model."""
    layers = list(llava.model.language_model.named_modules(prefix="model.language_model"))
    for name, module in layers:
        if name.rpartition(".")[2] in LINEAR_LAYERS:
            weight = module.weight.data
            try:
                yield name, weight, hqq_linear(name, weight, bits=bits, group_size=group_size)
            except ValueError as error:
                raise ConfigError(f"train.hqq_group_size={group_size}: {error}") from error
