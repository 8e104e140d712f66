"""A frozen base in HQQ's low bits, under LoRA that recovers what rounding lost.

Source: HQQ+ (https://mobiusml.github.io/1bit_blog). transformers' HqqConfig raises
NotImplementedError, so hqq's own layers are put in; peft knows them.
"""

from typing import Any

from llava_ray.errors import ConfigError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize_base(llava: Any, *, bits: int, group_size: int) -> None:
    """Put an HQQLinear in the place of each linear layer of the language model.

    Raises ConfigError when a layer's weights cannot be split into such groups.
    """
    from hqq.core.quantize import HQQLinear

    for name, weight in _weights(llava):
        layer = HQQLinear.from_weights(
            weight, None, _config(name, weight, bits, group_size),
            compute_dtype=weight.dtype, device=str(weight.device),
        )  # fmt: skip
        llava.set_submodule(name, layer)


def fake_quantize_base(llava: Any, *, bits: int, group_size: int) -> None:
    """Replace each such weight by the value that its packed form stands for."""
    from hqq.core.quantize import Quantizer

    for name, weight in _weights(llava):
        config = _config(name, weight, bits, group_size)
        packed, meta = Quantizer.quantize(
            weight, device=str(weight.device), compute_dtype=weight.dtype,
            **config["weight_quant_params"],
        )  # fmt: skip
        weight.copy_(Quantizer.dequantize(packed, meta).view_as(weight))


def _weights(llava: Any) -> list[tuple[str, Any]]:
    layers = llava.model.language_model.named_modules(prefix="model.language_model")
    return [(name, m.weight.data) for name, m in layers if name.rpartition(".")[2] in LINEAR_LAYERS]


def _config(name: str, weight: Any, bits: int, group_size: int) -> dict[str, Any]:
    from hqq.core.quantize import BaseQuantizeConfig

    per_byte = 1 if bits == 3 else 8 // bits
    if weight.shape[1] % group_size or (weight.numel() // group_size) % per_byte:
        raise ConfigError(
            f"train.hqq_group_size={group_size}: {name} is {tuple(weight.shape)}, which such "
            f"groups at {bits} bits do not divide: use a smaller group"
        )
    config: dict[str, Any] = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return config
