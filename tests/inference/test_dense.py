"""Weights that are unpacked once for a CPU: the same answers, nothing packed left."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_inputs import kl_divergence, packed_by_awq, probe_logits, quantized

from llava_ray.inference.torch.kernels.weights import make_dense
from llava_ray.quantize.registry import spec_for

SLUGS = [
    "awq-w4-g64", "hqq-w8-g64", "hqq-w4-g64", "hqq-w3-g64", "hqq-w2-g64", "hqq-w1-g64",
    "hqq-w4-g32-vision", "bnb-nf4", "bnb-fp4", "bnb-nf4-dq", "bnb-nf4-vision", "bnb-int8",
]  # fmt: skip
LANGUAGE, VISION, HEAD = 6 * 7, 7 * 6 + 2, 1
"""Linears of the tiny model."""


def variant(slug: str, folder: Path) -> Path:
    if not slug.startswith("awq"):
        return quantized(spec_for(slug), folder)
    folder.mkdir()
    packed_by_awq(folder, 64)
    return folder


@pytest.mark.parametrize("slug", SLUGS)
def test_unpacked_weights_answer_as_the_packed_ones(slug: str, tmp_path: Path) -> None:
    spec: Any = spec_for(slug)
    folder = variant(slug, tmp_path / "packed")
    packed, model = spec.load(folder, "cpu"), spec.load(folder, "cpu")
    make_dense(model, torch.float32)
    plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert len(plain) == LANGUAGE + VISION + HEAD
    if slug.startswith(("bnb-nf4", "bnb-fp4")):
        # On some CPUs bitsandbytes itself multiplies in 16 bits.
        for name, module in packed.named_modules():
            if type(module).__name__ == "Linear4bit":
                difference = model.get_submodule(name).weight - by_the_codebook(module.weight)
                assert difference.abs().max() < 1e-6
        return
    expected, found = probe_logits(packed), probe_logits(model)
    if slug == "bnb-int8":
        # The packed layers round activations to 8 bits as well.
        assert kl_divergence(expected, found) < 1e-3
    else:
        assert (found - expected).abs().max() < 1e-4


def by_the_codebook(weight: Any) -> torch.Tensor:
    """Look each 4-bit index up and multiply it by its block's scale, which may be packed too."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        inner = state.state2
        blocks = inner.absmax.repeat_interleave(inner.blocksize)[: scales.numel()]
        scales = inner.code[scales.long()] * blocks + state.offset
    packed = weight.data.flatten()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    values = state.code[indices.long()].view(-1, state.blocksize) * scales[:, None]
    return values.view(state.shape)


@pytest.mark.parametrize("slug", ["awq-w4-g64", "hqq-w4-g64", "bnb-nf4", "bnb-int8"])
def test_a_cpu_engine_holds_no_packed_weight_and_counts_what_it_reads(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec: Any = spec_for(slug)
    folder = variant(slug, tmp_path / "packed")
    model = spec.load(folder, "cpu")
    layer = model.model.language_model.layers[0].mlp.up_proj
    packed = weakref.ref(layer)
    del layer
    monkeypatch.setattr(type(spec), "load", lambda *_: model)
    engine = spec.open_engine(folder, device="cpu", slots=1, context=64)
    gc.collect()
    assert packed() is None
    base = spec_for("none-fp16")
    reference = base.open_engine(
        quantized(base, tmp_path / "base"), device="cpu", slots=1, context=64
    )
    assert engine.weight_bytes() == reference.weight_bytes()
