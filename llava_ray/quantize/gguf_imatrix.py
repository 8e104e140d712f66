"""Importance matrices from calibration samples with their images.

llama.cpp's own tool sees text only. What it measures is measured here by hooks on the merged
model: the mean square of each input of each linear.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from llava_ray.console import Progress
from llava_ray.inference.llama_cpp.types import FILE_TYPES, NEEDS_IMATRIX, PLAIN, PREFIX
from llava_ray.models import tensors as llava_folder
from llava_ray.models.family import family_of
from llava_ray.quantize.gguf import GgufSpec, Importance
from llava_ray.quantize.gguf_writer import gguf_names, is_text
from llava_ray.quantize.spec import Calibration, whole_model
from llava_ray.resources.capacity import Resources

_SUFFIX = "-imatrix"
_MAX_TOKENS = 2048


@dataclass(frozen=True)
class GgufImatrixSpec(GgufSpec):
    """A file type whose rounding is weighed by an importance matrix."""

    known_slugs: ClassVar[tuple[str, ...]] = (
        *(PREFIX + name for name in NEEDS_IMATRIX),
        # The K-quants that gain most by one.
        *(PREFIX + name + _SUFFIX for name in ("q2_k", "q3_k_m", "q4_k_m")),
    )
    calibrated: ClassVar[bool] = True

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `gguf-<type>` of the types that need a matrix, or `gguf-<type>-imatrix`."""
        name = slug.removeprefix(PREFIX).removesuffix(_SUFFIX)
        asked = slug.endswith(_SUFFIX)
        possible = name in FILE_TYPES and name not in PLAIN and asked != (name in NEEDS_IMATRIX)
        return cls(slug, name) if slug.startswith(PREFIX) and possible else None

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
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    samples = calibration.samples()
    dtype = torch.float32 if device == "cpu" else llava_folder.storage_dtype(merged)
    model: Any = AutoModelForImageTextToText.from_pretrained(merged, dtype=dtype)
    model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    family = family_of(merged)
    sums: dict[str, torch.Tensor] = {}
    rows_seen: Counter[str] = Counter()

    def watch(target: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            sums[target] = sums.get(target, 0) + rows.square().sum(0)
            rows_seen[target] += len(rows)

        return add

    target_of = gguf_names(model.config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and is_text(name):
            module.register_forward_pre_hook(watch(str(target_of(f"{name}.weight"))))
    progress = Progress("importance", len(samples), "samples")
    for number, sample in enumerate(samples, start=1):
        ids, shown = calibration.encode(sample, tokenizer, family, max_tokens=_MAX_TOKENS)
        if shown:
            shown["pixel_values"] = shown["pixel_values"].to(device, dtype)
        with torch.no_grad():
            model(input_ids=ids[None].to(device), **shown)
        progress.at(number)
    return {name: (total / rows_seen[name]).cpu().numpy() for name, total in sums.items()}
