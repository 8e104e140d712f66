"""The baseline: the merged model as it is, in one of three dtypes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.spec import Calibration, QuantizationSpec, process_memory
from llava_ray.resources.capacity import Resources

_SLUG = re.compile(r"none-(fp16|bf16|fp32)")
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class NoneSpec(QuantizationSpec):
    """Weights in fp16, bf16 or fp32."""

    method: ClassVar[str] = "none"
    known_slugs: ClassVar[tuple[str, ...]] = tuple(f"none-{dtype}" for dtype in _DTYPES)

    dtype: str

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `none-<dtype>`."""
        match = _SLUG.fullmatch(slug)
        return cls(slug=slug, dtype=match[1]) if match else None

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Ask for one CPU and the memory of one shard."""
        return Resources(memory_bytes=process_memory(model_bytes))

    def bits_per_weight(self) -> float:
        """Return 16 or 32."""
        return 32 if self.dtype == "fp32" else 16

    def other_bits_per_weight(self) -> float:
        """Return the same bits: all weights are cast."""
        return self.bits_per_weight()

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> None:
        """Cast every weight; nothing else changes."""
        import torch

        llava_folder.rewrite(merged, out, dtype=getattr(torch, _DTYPES[self.dtype]), device="cpu")

    def load(self, folder: Path, device: str) -> Any:
        """Return the model; on a CPU it runs in fp32."""
        return llava_folder.load_model(folder, device)[0]
