"""AWQ: activation-aware weight quantization, made by AutoAWQ in an environment of its own.

AutoAWQ 0.2.9 runs only beside transformers 4.51, so Ray builds its task a copy of the base
environment with these packages exchanged; the same torch is used. Source: arXiv 2306.00978.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llava_ray.errors import VariantError
from llava_ray.quantize import llava_folder
from llava_ray.quantize.spec import Calibration, QuantizationSpec, Resources

if TYPE_CHECKING:
    from llava_ray.serving.engine import Engine

PACKAGES = (
    "autoawq==0.2.9",
    "transformers==4.51.3",
    "datasets==3.6.0",
    "dill==0.3.8",
    "fsspec==2025.3.0",
    "huggingface_hub==0.36.2",
    "multiprocess==0.70.16",
    "tokenizers==0.21.4",
    "zstandard==0.25.0",
)
"""All that differs from the base environment, so that pip need not resolve anything."""

_SLUG = re.compile(r"awq-w4-g(32|64|128)(-sym)?(-text)?")
_SETUP_TIMEOUT_S = 1800
"""For the copy of the environment, which holds gigabytes of CUDA libraries, and a slow network."""


@dataclass(frozen=True)
class AwqSpec(QuantizationSpec):
    """4-bit integers in AutoAWQ's GEMM layout, scaled by what the activations show."""

    method: ClassVar[str] = "awq"
    extra: ClassVar[str | None] = "awq"
    calibrated: ClassVar[bool] = True

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

    @classmethod
    def known_slugs(cls) -> tuple[str, ...]:
        """Return the usual group sizes, and the other choices for one of them."""
        return (
            "awq-w4-g64",
            "awq-w4-g128",
            "awq-w4-g128-sym",
            "awq-w4-g128-text",
        )

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Ask for a GPU, else two CPUs; the whole model stays in memory, in fp32 without a GPU."""
        memory = int(model_bytes * (1.5 if gpu else 3)) + 2 * 2**30
        return Resources(num_cpus=2, num_gpus=1 if gpu else 0, memory_bytes=memory)

    def runtime_env(self) -> dict[str, Any]:
        """Return the base environment with AutoAWQ's own versions over it."""
        return {
            "pip": {
                "packages": list(PACKAGES),
                "pip_check": False,
                "pip_install_options": ["--no-deps", "--disable-pip-version-check"],
            },
            "config": {"setup_timeout_seconds": _SETUP_TIMEOUT_S},
        }

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
            "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"],
        }

    def quantize(
        self, merged: Path, out: Path, calibration: Calibration, device: str
    ) -> llava_folder.Phases:
        """Search scales and clipping on the calibration samples, then pack.

        Raises VariantError outside AutoAWQ's environment, or where groups do not divide rows.
        """
        for name, shape in llava_folder.weight_shapes(merged).items():
            module = llava_folder.module_name(name.removesuffix(".weight"))
            if self.quantizes(module) and (shape[1] % self.group_size or shape[0] % 32):
                raise VariantError(
                    f"variant {self.slug!r}: {name} is {shape[0]}x{shape[1]}; rows must divide "
                    f"by {self.group_size} and their number by 32: use a smaller group"
                )
        try:
            import awq  # noqa: F401
        except ImportError as error:
            raise VariantError(
                f"variant {self.slug!r}: AutoAWQ is not importable ({error}); it runs in its own "
                "Ray runtime_env, so make it with 'python jobs/quantize.py'"
            ) from error
        from llava_ray.quantize.awq_calibration import quantize_with_autoawq

        return quantize_with_autoawq(self, merged, out, calibration, device)

    def load(self, folder: Path, device: str) -> Any:
        """Return the model with packed linears; on a CPU the rest is fp32."""
        from llava_ray.quantize.awq_linear import AwqLinear

        model = llava_folder.empty_model(folder)
        names = [name for name, _ in model.named_modules() if self.quantizes(name)]
        for name in names:
            model.get_submodule(name).weight = None
        dtype = llava_folder.compute_dtype(llava_folder.storage_dtype(folder), device)
        packed = llava_folder.fill_model(model, folder, device, dtype)
        for name in names:
            linear = AwqLinear(
                packed.pop(f"{name}.qweight"),
                packed.pop(f"{name}.qzeros"),
                packed.pop(f"{name}.scales"),
                bias=model.get_submodule(name).bias,
            )
            model.set_submodule(name, linear)
        return model

    def open_engine(self, folder: Path, *, device: str, slots: int, context: int) -> "Engine":
        """Load the variant's folder for generation."""
        from llava_ray.serving.torch_engine import TorchEngine

        model = self.load(folder, device)
        return TorchEngine(model, folder=folder, device=device, slots=slots, context=context)
