"""Importance matrices: measured on images and text, and used by llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_inputs import small_model
from small_data import write_dataset
from tiny_run import squares

from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp.types import FILE_TYPES, NEEDS_IMATRIX, expected_bits
from llava_ray.models.family import family_of
from llava_ray.quantize.gguf import measured_bits_per_weight, quantize_file
from llava_ray.quantize.gguf_imatrix import importance_matrix
from llava_ray.quantize.gguf_writer import write_pair
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration

pytest.importorskip("llama_cpp", reason="needs 'pip install llava_ray[gguf]'")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Three pictures with captions, of which two count."""
    dataset = squares(tmp_path_factory.mktemp("dataset"), num_train=3)
    return Calibration(dataset.uri, num_samples=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("small") / "merged")


@pytest.fixture(scope="module")
def importance(small: Path, calibration: Calibration) -> Any:
    return importance_matrix(small, calibration, "cpu")


@pytest.fixture(scope="module")
def source(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_pair(small, folder / "llava.gguf", folder / "mmproj.gguf", precision="f16")
    return folder / "llava.gguf"


def test_the_first_layer_has_the_mean_squares_of_its_normed_inputs(
    importance: Any, small: Path, calibration: Calibration
) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small)
    squares, count = torch.zeros(256), 0
    for sample in calibration.samples():
        ids, shown = calibration.encode(sample, tokenizer, family_of(small), max_tokens=2048)
        with torch.no_grad():
            inputs = {"input_ids": ids[None], **shown}
            hidden = model(**inputs, output_hidden_states=True).hidden_states[0]
            rows = model.model.language_model.layers[0].input_layernorm(hidden)[0]
        squares, count = squares + rows.square().sum(0), count + len(rows)
    for name in ("attn_q", "attn_k", "attn_v"):
        found = importance[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(found, (squares / count).numpy(), rtol=1e-4)


def test_every_linear_and_the_head_have_a_row(importance: Any) -> None:
    assert len(importance) == 2 * 7 + 1
    assert importance["blk.1.ffn_down.weight"].shape == (256,)
    assert importance["output.weight"].shape == (256,)
    assert all((values >= 0).all() and values.any() for values in importance.values())


@pytest.mark.parametrize("name", NEEDS_IMATRIX)
def test_the_types_that_need_a_matrix_are_written(
    name: str, importance: Any, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "llava.gguf"
    quantize_file(source, target, FILE_TYPES[name], importance)
    # Mixtures depend on the number of layers.
    assert measured_bits_per_weight(target) == pytest.approx(expected_bits(name), rel=0.15)


def test_a_matrix_lowers_the_weighed_error(importance: Any, source: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    name = "blk.1.ffn_down.weight"
    original = {t.name: t.data for t in GGUFReader(source).tensors}[name].astype(np.float32)
    weights = importance[name]
    # A column that matters a thousandfold, so that rounding must follow the matrix.
    weights = np.where(np.arange(len(weights)) % 16 == 0, 1000.0, 1.0).astype(np.float32)
    errors = []
    for matrix in (None, {**importance, name: weights}):
        target = tmp_path / f"{matrix is None}.gguf"
        quantize_file(source, target, FILE_TYPES["q2_k"], matrix)
        tensor = {t.name: t for t in GGUFReader(target).tensors}[name]
        found = dequantize(tensor.data, tensor.tensor_type)
        errors.append(float(((found - original) ** 2 * weights).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_a_variant_is_made_from_the_calibration_samples(
    small: Path, calibration: Calibration, tmp_path: Path
) -> None:
    spec = spec_for("gguf-iq2_xxs")
    assert spec.calibrated
    spec.quantize(small, tmp_path, calibration, "cpu")
    assert (tmp_path / "llava-iq2_xxs.gguf").is_file()


def test_no_samples_are_refused(small: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, [])
    with pytest.raises(VariantError, match="no calibration samples"):
        importance_matrix(small, Calibration(str(tmp_path), 8), "cpu")
