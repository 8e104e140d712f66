"""HQQ: half-quadratic quantization, which needs no calibration.

A linear is stored as `hqq.core.quantize.HQQLinear.state_dict` has it, in safetensors, so the
folder reloads to the same bits without quantizing again (hqq's own `save_quantized` pickles).
Surprising: they lie in a folder of their own, since transformers would load them where it looks for
weights, and draw all that HQQ packed anew.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llava_ray.errors import VariantError
from llava_ray.models import tensors as llava_folder
from llava_ray.models.low_bits import check_groups, hqq_linear
from llava_ray.quantize.spec import Calibration, QuantizationSpec

if TYPE_CHECKING:
    import torch

_WEIGHTS = "hqq"
"""The folder of the safetensors, in the variant's."""
_SLUG = re.compile(r"hqq-w([84321])-g(16|32|64|128|256)(-vision)?")


@dataclass(frozen=True)
class HqqSpec(QuantizationSpec):
    """Integers of 8, 4, 3, 2 or 1 bits, with an fp16 scale and zero point per group."""

    method: ClassVar[str] = "hqq"
    packages: ClassVar[tuple[str, ...]] = ("hqq",)
    known_slugs: ClassVar[tuple[str, ...]] = tuple(
        f"hqq-w{bits}-g{group}" for bits in (8, 4, 3, 2, 1) for group in (16, 32, 64, 128, 256)
    )

    bits: int
    group_size: int

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `hqq-w<bits>-g<group size>`, then `-vision` if wanted."""
        match = _SLUG.fullmatch(slug)
        if not match:
            return None
        return cls(slug, int(match[1]), int(match[2]))

    def bits_per_weight(self) -> float:
        """Return the bits of a weight with its share of scale and zero point.

        Ten 3-bit weights lie in an int32.
        """
        return (3.2 if self.bits == 3 else self.bits) + 32 / self.group_size

    def check(self, folder: Path) -> None:
        """Raise VariantError where groups do not divide a weight."""
        for name, shape in self.shapes(folder):
            try:
                check_groups(name, shape, bits=self.bits, group_size=self.group_size)
            except ValueError as error:
                raise VariantError(f"variant {self.slug!r}: {error}") from error

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> None:
        """Quantize each linear by itself."""
        from hqq.core.quantize import BaseQuantizeConfig

        llava_folder.rewrite(
            merged,
            out,
            dtype=llava_folder.storage_dtype(merged),
            device=device,
            pack=self._pack,
            quantizes=self.quantizes,
            quantization_config={
                "quant_method": "hqq",
                "quant_config": BaseQuantizeConfig(self.bits, self.group_size, axis=1),
                "skip_modules": ["lm_head"] if self.vision else ["lm_head", "vision_tower"],
            },
        )
        (out / _WEIGHTS).mkdir()
        for path in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
            path.rename(out / _WEIGHTS / path.name)

    def load(self, folder: Path, device: str) -> Any:
        """Return the model with HQQ's linears, bit for bit as they were stored."""
        from hqq.core.quantize import HQQLinear

        weights = folder / _WEIGHTS
        model, packed = llava_folder.load_model(folder, device, self.quantizes, weights)
        for name, state in packed.items():
            linear = HQQLinear(
                None, None, compute_dtype=model.dtype, device=device, initialize=False
            )
            linear.load_state_dict(state)
            linear.bias = model.get_submodule(name).bias
            model.set_submodule(name, linear)
        return model

    def _pack(self, name: str, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        try:
            linear = hqq_linear(name, weight, bits=self.bits, group_size=self.group_size)
        except ValueError as error:
            raise VariantError(f"variant {self.slug!r}: {error}") from error
        return {key: value.data for key, value in linear.state_dict().items()}
