"""AWQ: activation-aware weight quantization, made by AutoAWQ in an environment of its own.

AutoAWQ 0.2.9 runs only beside transformers 4.51, so a process of its own, with packages of its own
(awq_environment.py), does the work. Source: arXiv 2306.00978.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from llava_ray.errors import VariantError
from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.awq_environment import autoawq_folder
from llava_ray.quantize.spec import Calibration, QuantizationSpec, whole_model
from llava_ray.resources.capacity import Resources
from llava_ray.resources.crash import run_child
from llava_ray.shipped import shipped

_SLUG = re.compile(r"awq-w4-g(32|64|128)(-sym)?(-text)?")


@dataclass(frozen=True)
class AwqSpec(QuantizationSpec):
    """4-bit integers in AutoAWQ's GEMM layout, scaled by what the activations show."""

    method: ClassVar[str] = "awq"
    known_slugs: ClassVar[tuple[str, ...]] = (
        "awq-w4-g64", "awq-w4-g128", "awq-w4-g128-sym", "awq-w4-g128-text",
    )  # fmt: skip
    calibrated: ClassVar[bool] = True

    def made_with(self) -> dict[str, str]:
        """Return the versions of the packages that shape the variant; AutoAWQ's are all locked."""
        locked = shipped("jobs/requirements/awq.txt").read_bytes()
        return super().made_with() | {"awq.txt": hashlib.sha256(locked).hexdigest()[:12]}

    group_size: int
    zero_point: bool
    """Whether each group has a zero point; `-sym` has none."""
    images: bool
    """Whether images are part of the calibration samples; `-text` leaves them out."""

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `awq-w4-g<group size>`, then `-sym` and `-text` if wanted."""
        match = _SLUG.fullmatch(slug)
        if not match:
            return None
        return cls(slug, int(match[1]), zero_point=not match[2], images=not match[3])

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Ask for a GPU if there is one; the whole model stays in memory, in fp32 on CPUs."""
        return whole_model(model_bytes, gpu=gpu)

    def bits_per_weight(self) -> float:
        """Return 4 bits with the share of an fp16 scale and a 4-bit zero point per group."""
        return 4 + (16 + 4) / self.group_size

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says of the layout, by AutoAWQ's keys.

        Symmetric weights have a zero point too: the middle of 0 to 15, in every group.
        """
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            # transformers 5 matches from the start of a name, vLLM anywhere in it.
            "modules_to_not_convert": [
                "model.vision_tower",
                "model.multi_modal_projector",
                "vision_tower",
                "multi_modal_projector",
                "lm_head",
            ],
        }

    def check(self, folder: Path) -> None:
        """Raise VariantError where groups do not divide rows."""
        super().check(folder)
        for name, shape in self.shapes(folder):
            if shape[1] % self.group_size or shape[0] % 32:
                smaller = [size for size in (32, 64) if not (shape[1] % size or shape[0] % 32)]
                cure = f"use groups of {smaller[-1]}" if smaller else "no group size of AWQ's does"
                raise VariantError(
                    f"variant {self.slug!r}: {name} is {shape[0]}x{shape[1]}; rows must divide "
                    f"by {self.group_size} and their number by 32: {cure}"
                )

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> int:
        """Search scales and clipping on the calibration samples, then pack.

        Raises VariantError where groups do not divide rows, AutoAWQ cannot be had or it fails.
        """
        self.check(merged)
        with tempfile.TemporaryDirectory() as folder:
            task, result = Path(folder) / "task.json", Path(folder) / "peak_memory_bytes"
            settings = asdict(calibration) | {
                "slug": self.slug, "merged": merged, "out": out, "device": device,
            }  # fmt: skip
            task.write_text(json.dumps(settings, default=str), encoding="utf-8")
            crash = run_child(
                "llava_ray.quantize.awq_calibration", [str(task), str(result)],
                name=self.slug, before=autoawq_folder(),
            )[1]  # fmt: skip
            if crash is not None:
                raise VariantError(f"AutoAWQ's process {crash.describe()}")
            return int(result.read_text(encoding="utf-8"))

    def load(self, folder: Path, device: str) -> Any:
        """Return the model with packed linears; on a CPU the rest is fp32."""
        from llava_ray.quantize.awq_linear import AwqLinear

        model, packed = llava_folder.load_model(folder, device, self.quantizes)
        for name, parts in packed.items():
            linear = AwqLinear(**parts, bias=model.get_submodule(name).bias)
            model.set_submodule(name, linear)
        return model
