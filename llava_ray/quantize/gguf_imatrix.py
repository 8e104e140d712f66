"""Importance matrices from calibration samples with their images.

llama.cpp's own tool sees text only. What it measures is measured here by hooks on the merged
model: the mean square of each input of each linear.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp.types import FILE_TYPES, NEEDS_IMATRIX, PLAIN, PREFIX
from llava_ray.models import tensors as llava_folder
from llava_ray.models.conversation import encode_sample, read_samples
from llava_ray.models.images import normalize, open_image, square_pixels
from llava_ray.quantize.gguf import GgufSpec, Importance
from llava_ray.quantize.gguf_writer import text_targets
from llava_ray.quantize.spec import Calibration, whole_model
from llava_ray.resources.capacity import Resources

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SUFFIX = "-imatrix"
_MAX_LENGTH = 2048
_MAX_PIXELS = 50_000_000
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class GgufImatrixSpec(GgufSpec):
    """A file type whose rounding is weighed by an importance matrix."""

    calibrated: ClassVar[bool] = True

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `gguf-<type>` of the types that need a matrix, or `gguf-<type>-imatrix`."""
        name = slug.removeprefix(PREFIX).removesuffix(_SUFFIX)
        asked = slug.endswith(_SUFFIX)
        possible = name in FILE_TYPES and name not in PLAIN and asked != (name in NEEDS_IMATRIX)
        return cls(slug, name) if slug.startswith(PREFIX) and possible else None

    @classmethod
    def known_slugs(cls) -> tuple[str, ...]:
        """Return the types that need a matrix, and those K-quants that gain most by one."""
        gaining = ("q2_k", "q3_k_m", "q4_k_m")
        return (
            *(PREFIX + name for name in NEEDS_IMATRIX),
            *(PREFIX + name + _SUFFIX for name in gaining),
        )

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Ask for a GPU where there is one; the whole model stays in memory, in fp32 on a CPU."""
        return whole_model(model_bytes, gpu=gpu)

    def _importance(self, merged: Path, calibration: Calibration, device: str) -> Importance | None:
        return importance_matrix(merged, calibration, device)


def importance_matrix(merged: Path, calibration: Calibration, device: str) -> Importance:
    """Return the mean square of each linear's inputs, by the name of its tensor in the text GGUF.

    All positions of a sample count, those of the image too.
    """
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    samples = read_samples(calibration.dataset_folder / "train.json")[: calibration.num_samples]
    if not samples:
        raise VariantError("no calibration samples: the data set's train.json is empty")
    dtype = llava_folder.compute_dtype(llava_folder.storage_dtype(merged), device)
    model: Any = LlavaForConditionalGeneration.from_pretrained(merged, dtype=dtype)
    model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    vision = model.config.vision_config
    watched = _Watched(model, text_targets(model.config.text_config))
    start = last_said = time.monotonic()
    for number, sample in enumerate(samples, start=1):
        ids, _ = encode_sample(
            tokenizer,
            sample,
            tokens_per_image=(vision.image_size // vision.patch_size) ** 2,
            max_length=_MAX_LENGTH,
            system=calibration.system_prompt,
        )
        path = calibration.dataset_folder / "images" / sample.image
        pixels = square_pixels(open_image(path, max_pixels=_MAX_PIXELS), vision.image_size)
        with torch.no_grad():
            model(
                input_ids=torch.tensor([ids], device=device),
                pixel_values=normalize(pixels)[None].to(device, dtype),
            )
        now = time.monotonic()
        if now - last_said > _LOG_EVERY_S:
            last_said = now
            left_s = (now - start) / number * (len(samples) - number)
            logger.info("importance: %d of %d samples, %.0f s left", number, len(samples), left_s)
    return watched.means()


class _Watched:
    """Sums of squares of what goes into a model's linears."""

    def __init__(self, model: Any, targets: Mapping[str, str]) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        for name, module in model.named_modules():
            target = targets.get(f"{name}.weight")
            if target and hasattr(module, "in_features"):
                module.register_forward_pre_hook(self._hook(target))

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Return the means so far, float32 [inputs] each."""
        return {
            name: (total / self._counts[name]).float().cpu().numpy()
            for name, total in self._sums.items()
        }

    def _hook(self, target: str) -> Any:
        def add(module: Any, inputs: "tuple[torch.Tensor, ...]") -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            total = rows.square().sum(0)
            known = self._sums.get(target)
            self._sums[target] = total if known is None else known + total
            self._counts[target] = self._counts.get(target, 0) + len(rows)

        return add
