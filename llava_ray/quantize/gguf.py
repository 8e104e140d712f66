"""GGUF: llama.cpp's formats, as a pair of files that llama.cpp's own tools open.

A variant's folder holds `llava-<type>.gguf`, `mmproj-<f16 or f32>.gguf`, and config.json and the
tokenizer's files of the merged model, so that prompts become the same ids as everywhere else.
"""

import ctypes
import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader
from numpy.typing import NDArray

from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp.native import last_error, load_llama_cpp
from llava_ray.inference.llama_cpp.trial import check_file
from llava_ray.inference.llama_cpp.types import (
    FILE_TYPES,
    NEEDS_IMATRIX,
    PLAIN,
    PREFIX,
    expected_bits,
    head_bits,
    main_type,
)
from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.gguf_parity import check_parity, check_tokenization
from llava_ray.quantize.gguf_source import shared_pair
from llava_ray.quantize.gguf_writer import (
    check_convertible,
    lossless_precision,
    write_f32_folder,
    write_pair,
)
from llava_ray.quantize.spec import Calibration, QuantizationSpec, process_memory
from llava_ray.resources.capacity import Resources

if TYPE_CHECKING:
    from llava_ray.inference.engine import Engine

logger = logging.getLogger(__name__)

Importance = Mapping[str, NDArray[np.float32]]
"""Weights of a tensor's columns, by the tensor's name in the text GGUF."""

GATED_BYTES = 2**30
"""Merged models up to this size are compared with their F32 pair before each quantization."""


@dataclass(frozen=True)
class GgufSpec(QuantizationSpec):
    """One of llama.cpp's file types, such as q4_k_m, for the text model."""

    method: ClassVar[str] = "gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf", "llama-cpp-python")
    known_slugs: ClassVar[tuple[str, ...]] = tuple(
        PREFIX + name for name in FILE_TYPES if name not in NEEDS_IMATRIX
    )

    name: str

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        """Read `gguf-<file type>` of a type that needs no importance matrix."""
        name = slug.removeprefix(PREFIX)
        possible = name in FILE_TYPES and name not in NEEDS_IMATRIX
        return cls(slug, name) if slug.startswith(PREFIX) and possible else None

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        """Ask for CPUs only, one for each GB: llama.cpp quantizes there, rows beside each other."""
        cpus = min(8, max(1, model_bytes // 10**9))
        return Resources(num_cpus=cpus, memory_bytes=process_memory(model_bytes))

    def bits_per_weight(self) -> float:
        """Return the expected mean; `measured_bits_per_weight` reads a file's own."""
        return expected_bits(self.name)

    def measured_bits(self, folder: Path) -> float:
        """Return the file's own mean: rows that do not divide by a block have another type."""
        return measured_bits_per_weight(folder / f"llava-{self.name}.gguf")

    def estimated_bytes(self, merged: Path) -> int:
        """Estimate the pair's size: embeddings and head are quantized too, CLIP is not."""
        bits = 0.0
        for stored, shape in llava_folder.weight_shapes(merged).items():
            name = llava_folder.module_name(stored)
            if name == "lm_head.weight":
                each = head_bits(self.name)
            elif name.startswith("model.language_model."):
                each = expected_bits(self.name)
            else:
                each = 32 if self.name == "f32" else 16
            bits += math.prod(shape) * each
        return int(bits / 8)

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> None:
        """Write the pair in full precision, compare it with the merged model, then quantize."""
        self.check(merged)
        llava_folder.copy_sidecars(merged, out)
        shutil.copyfile(merged / "config.json", out / "config.json")
        text = out / f"llava-{self.name}.gguf"
        mmproj = out / f"mmproj-{'f32' if self.name == 'f32' else 'f16'}.gguf"
        if self.name in PLAIN:
            write_pair(merged, text, mmproj, precision=self.name)
        self._gate(merged, out)
        if self.name not in PLAIN:
            importance = self._importance(merged, calibration, device)
            with shared_pair(merged, out.parent, lossless_precision(merged)) as (source, vision):
                shutil.copyfile(vision, mmproj)
                quantize_file(source, text, FILE_TYPES[self.name], importance)
        check_file(text, threads())
        self._report(text)

    def open_engine(self, folder: Path, *, device: str, slots: int, context: int) -> "Engine":
        """Load the variant's folder for generation."""
        from llava_ray.inference.llama_cpp.engine import LlamaCppEngine

        return LlamaCppEngine(folder, device=device, slots=slots, context=context)

    def _importance(self, merged: Path, calibration: Calibration, device: str) -> Importance | None:
        """Return what weighs the rounding; None weighs all columns alike."""
        return None

    def check(self, folder: Path) -> None:
        """Raise VariantError for a model that llama.cpp cannot run, and for rows that it would
        quietly write as another type."""
        super().check(folder)
        check_convertible(folder)
        block = GGML_QUANT_SIZES[main_type(self.name)][0]
        columns = {shape[1] for _, shape in self.shapes(folder)}
        if columns and all(count % block for count in columns):
            least = GGML_QUANT_SIZES[main_type("q8_0")][0]
            fits = not any(count % least for count in columns)
            raise VariantError(
                f"variant {self.slug!r}: rows of {sorted(columns)} weights do not divide by "
                f"{block}, so llama.cpp would write other types; use "
                f"{'gguf-q8_0 or gguf-q4_0' if fits else 'gguf-f16, gguf-bf16 or gguf-f32'}"
            )

    def _gate(self, merged: Path, out: Path) -> None:
        """Compare the F32 pair with the merged model: always for f32, else where it is cheap."""
        size_bytes = llava_folder.stored_bytes(merged)
        if self.name == "f32":
            difference = check_parity(merged, out)
        elif size_bytes <= GATED_BYTES:
            with tempfile.TemporaryDirectory(dir=out) as pair:
                write_f32_folder(merged, Path(pair))
                difference = check_parity(merged, Path(pair))
        else:
            logger.info("%s: parity is checked by gguf-f32 for a model of this size", self.slug)
            return
        logger.info("%s: the F32 pair's logits differ by at most %.1e", self.slug, difference)

    def _report(self, text: Path) -> None:
        check_tokenization(text)
        counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(text).tensors)
        types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        bits = measured_bits_per_weight(text)
        logger.info("%s: %.2f bits per weight of the linears; %s", self.slug, bits, types)


def quantize_file(
    source: Path, target: Path, file_type: int, importance: Importance | None = None
) -> None:
    """Quantize a text GGUF by llama.cpp's own llama_model_quantize.

    Raises VariantError with llama.cpp's reason.
    """
    llama_cpp = load_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads()
    if importance:
        # One entry more, whose name is null, ends the list.
        matrix = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(matrix, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(matrix, type(params.imatrix))
    paths = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
        raise VariantError(f"llama.cpp cannot write {target.name}: {last_error()}")


def threads() -> int:
    """Return the threads that PyTorch has: Ray sets them by the task's num_cpus."""
    import torch

    return torch.get_num_threads()


def measured_bits_per_weight(text: Path) -> float:
    """Return the mean bits of the language model's linear weights in a text GGUF."""
    linears = [
        tensor
        for tensor in GGUFReader(text).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    weights = sum(math.prod(int(size) for size in tensor.shape) for tensor in linears)
    return 8 * sum(int(tensor.n_bytes) for tensor in linears) / weights
