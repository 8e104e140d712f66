"""What a quantization method must say and do; one file beside this one per method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llava_ray.artifacts.identity import versions
from llava_ray.artifacts.storage import Storage
from llava_ray.errors import VariantError
from llava_ray.models import tensors as llava_folder
from llava_ray.models.conversation import Sample, encode_with_images
from llava_ray.models.dataset import Split
from llava_ray.models.family import Family, family_of
from llava_ray.resources.capacity import Resources

if TYPE_CHECKING:
    import torch

    from llava_ray.inference.engine import Engine


_TEXT_TOKENS = 448
"""Of a calibration sample, room for as many beside a picture."""


def process_memory(model_bytes: int) -> int:
    """Return the bytes of a process that writes a model shard by shard, libraries included."""
    return 2**30 + min(model_bytes, 2 * llava_folder.SHARD_BYTES)


def whole_model(model_bytes: int, *, gpu: bool) -> Resources:
    """Return what a method needs that holds the whole model: on a GPU, or in fp32 on CPUs."""
    memory = int(model_bytes * (1.5 if gpu else 3)) + 2 * 2**30
    cpus = min(2, max(1, model_bytes // 10**9))
    return Resources(num_cpus=cpus, num_gpus=1 if gpu else 0, memory_bytes=memory)


@dataclass(frozen=True)
class Calibration:
    """Training samples for the methods that look at activations."""

    dataset_uri: str
    num_samples: int
    system_prompt: str = ""

    def samples(self) -> list[Sample]:
        """Return the first training samples, pictures read; raises VariantError without any."""
        found = Split(Storage(self.dataset_uri), "train").first(self.num_samples)
        if not found:
            raise VariantError("no calibration samples: the data set's train.json is empty")
        return found

    def encode(
        self, sample: Sample, tokenizer: Any, family: Family, *, max_tokens: int
    ) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """Return token ids [tokens], cut at the end, and what the model takes of their images."""
        import torch

        encoded, images = encode_with_images(
            tokenizer,
            sample,
            family,
            max_length=max(max_tokens, family.max_image_tokens + _TEXT_TOKENS),
            max_pixels=10**9,
            system=self.system_prompt,
        )
        return torch.tensor(encoded.input_ids), family.inputs(images) if images else {}


@dataclass(frozen=True)
class QuantizationSpec(ABC):
    """One variant, fully described by its slug, such as `hqq-w4-g64`."""

    method: ClassVar[str]
    known_slugs: ClassVar[tuple[str, ...]]
    """The slugs worth listing; `parse` may take more."""
    calibrated: ClassVar[bool] = False
    """Whether the result depends on the calibration samples."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What makes and runs it beside PyTorch and transformers."""

    slug: str

    @property
    def vision(self) -> bool:
        """Whether the vision tower and the projector are quantized too."""
        return self.slug.endswith("-vision")

    @classmethod
    @abstractmethod
    def parse(cls, slug: str) -> Self | None:
        """Return the spec of a slug of this method, or None if it is not one."""

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Return what quantizing a model of that size needs, with or without a GPU at hand.

        Default: a quarter of the GPU, for methods that have one layer at a time on it.
        """
        return Resources(num_gpus=0.25 if gpu else 0, memory_bytes=process_memory(model_bytes))

    def made_with(self) -> dict[str, str]:
        """Return the versions of the packages that shape the variant."""
        return versions("torch", "transformers", *self.packages)

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return the bits a quantized weight takes, scales and zero points counted in."""

    def shapes(self, folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each weight that is quantized."""
        for name, shape in llava_folder.weight_shapes(folder).items():
            module = llava_folder.module_name(name.removesuffix(".weight"))
            if name.endswith(".weight") and self.quantizes(module):
                yield f"{module}.weight", shape

    def check(self, folder: Path) -> None:
        """Raise VariantError where a model of such config, tokenizer and shapes cannot be written
        so; no weight is read."""
        if obstacle := family_of(folder).obstacle(self.method):
            raise VariantError(f"variant {self.slug!r}: {obstacle}")

    def measured_bits(self, folder: Path) -> float:
        """Return the bits of a written variant's quantized weights; default: as its scheme says."""
        return self.bits_per_weight()

    def quantizes(self, module: str) -> bool:
        """Say whether the module of that name is quantized; default: the language model's linears,
        of slugs with `-vision` also those of tower and projector.

        The name is that of transformers 5, such as `model.language_model.layers.0.mlp.up_proj`.
        """
        return llava_folder.is_linear(module, vision=self.vision)

    def other_bits_per_weight(self) -> float:
        """Return the bits of a weight that stays unquantized: embeddings, head, vision tower."""
        return 16

    def estimated_bytes(self, merged: Path) -> int:
        """Estimate the variant's size on disk from the shapes in the merged model's headers.

        Good to a few percent; a method whose layout differs overrides it.
        """
        bits = 0.0
        for name, shape in llava_folder.weight_shapes(merged).items():
            module = llava_folder.module_name(name.removesuffix(".weight"))
            quantized = name.endswith(".weight") and self.quantizes(module)
            each = self.bits_per_weight() if quantized else self.other_bits_per_weight()
            bits += math.prod(shape) * each
        others = (p for p in merged.iterdir() if p.suffix in (".json", ".jinja", ".model"))
        return int(bits / 8) + sum(path.stat().st_size for path in others)

    @abstractmethod
    def quantize(
        self, merged: Path, out: Path, calibration: Calibration, device: str
    ) -> int | None:
        """Read the merged model's folder and write the variant's folder.

        Returns the peak of memory in bytes where a process of its own did the work. Raises
        VariantError where the model's shapes do not allow the scheme.
        """

    def load(self, folder: Path, device: str) -> Any:
        """Return the variant's model for PyTorch; on a CPU all that is not packed is fp32."""
        raise NotImplementedError(f"{self.method} has an engine of its own")

    def open_engine(self, folder: Path, *, device: str, slots: int, context: int) -> "Engine":
        """Load the variant's folder for generation; default: what `load` returns, in PyTorch."""
        from llava_ray.inference.torch.engine import TorchEngine

        model = self.load(folder, device)
        return TorchEngine(model, folder=folder, device=device, slots=slots, context=context)
