"""bitsandbytes: NF4, FP4 (blocks of 64) and LLM.int8 (one scale per row).

The tensors are those that transformers stores, so `from_pretrained` reads the folder as it is.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.spec import Calibration, QuantizationSpec

if TYPE_CHECKING:
    import torch

_SLUG = re.compile(r"bnb-(?:(int8)|(nf4|fp4)(-dq)?)(-vision)?")
_BLOCK = 64
_SCALE_BLOCK = 256
"""Blocks whose scales share one scale under double quantization."""


@dataclass(frozen=True)
class BnbSpec(QuantizationSpec):
    """4-bit normal floats, 4-bit floats or 8-bit integers."""

    method: ClassVar[str] = "bnb"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    known_slugs: ClassVar[tuple[str, ...]] = (
        "bnb-int8", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq",
    )  # fmt: skip

    type: str
    double: bool
    """Whether the scales are quantized in turn (QLoRA, https://arxiv.org/abs/2305.14314)."""

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `bnb-int8`, `bnb-nf4` or `bnb-fp4`, then `-dq` and `-vision` if wanted."""
        match = _SLUG.fullmatch(slug)
        if not match:
            return None
        return cls(slug, match[1] or match[2], double=bool(match[3]))

    def bits_per_weight(self) -> float:
        """Return the bits of a weight and its share of the scales.

        int8 has 32 bits more per row, which is under 0.01 bits per weight for rows of 4096.
        """
        if self.type == "int8":
            return 8
        scale = 8 + 32 / _SCALE_BLOCK if self.double else 32
        return 4 + scale / _BLOCK

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> None:
        """Quantize row by row (int8) or block by block."""
        dtype = llava_folder.storage_dtype(merged)
        llava_folder.rewrite(
            merged,
            out,
            dtype=dtype,
            device=device,
            pack=_pack_int8 if self.type == "int8" else self._pack_4bit,
            quantizes=self.quantizes,
            quantization_config=self._config(str(dtype).removeprefix("torch.")),
        )

    def load(self, folder: Path, device: str) -> Any:
        """Return the model with bitsandbytes' linears; on a CPU the rest is fp32."""
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(folder, device_map=device)
        if device == "cpu":
            for parameter in model.parameters():
                # Packed weights are integers and stay.
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
        return model.eval()

    def _pack_4bit(self, name: str, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(),
            blocksize=_BLOCK,
            compress_statistics=self.double,
            quant_type=self.type,
        )
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}

    def _config(self, dtype: str) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        # A SigLIP tower has a head, which no LLaVA asks.
        kept = ["model.vision_tower.head"]
        if not self.vision:
            kept = ["model.vision_tower", "model.multi_modal_projector"]
        four_bit = self.type != "int8"
        config: Any = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=four_bit,
            load_in_8bit=not four_bit,
            llm_int8_skip_modules=[*kept, "lm_head"],
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.type if four_bit else "fp4",
            bnb_4bit_use_double_quant=self.double,
        )
        tree: dict[str, Any] = config.to_dict()
        return tree


def _pack_int8(name: str, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    # threshold 0: outlier columns are found in the activations, not in the weights.
    packed, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    row_major = torch.zeros((), dtype=torch.uint8)
    return {"weight": packed, "SCB": scales, "weight_format": row_major}
