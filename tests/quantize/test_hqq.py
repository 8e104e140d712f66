"""HQQ: stored bits, reloaded without quantizing again."""

from pathlib import Path

import pytest
import torch
from quantize_inputs import TINY, kl_divergence, probe_logits, quantized, tensors_of

from llava_ray.errors import VariantError
from llava_ray.quantize.registry import spec_for


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_reload_has_the_bits_that_hqq_made(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    slug = f"hqq-w{bits}-g64"
    out = quantized(spec_for(slug), tmp_path / "out")
    weight = tensors_of(TINY)["language_model.model.layers.1.mlp.down_proj.weight"]
    expected = HQQLinear.from_weights(
        weight,
        None,
        BaseQuantizeConfig(nbits=bits, group_size=64, axis=1),
        compute_dtype=torch.float32,
        device="cpu",
    )

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(Quantizer, "quantize", refuse)
    linear = spec_for(slug).load(out, "cpu").model.language_model.layers[1].mlp.down_proj
    assert torch.equal(linear.W_q, expected.W_q)
    # Scales and zero points are stored in fp16.
    assert torch.equal(linear.meta["scale"], expected.meta["scale"].half().float())
    assert torch.equal(linear.meta["zero"], expected.meta["zero"].half().float())
    assert (linear.dequantize() - expected.dequantize()).abs().max() < 1e-3


def test_fewer_bits_are_further_from_the_baseline(tmp_path: Path) -> None:
    base = spec_for("none-fp16")
    reference = probe_logits(base.load(quantized(base, tmp_path / "base"), "cpu"))
    distances = []
    for bits in (8, 4, 3, 2, 1):
        one = spec_for(f"hqq-w{bits}-g64")
        model = one.load(quantized(one, tmp_path / one.slug), "cpu")
        distances.append(kl_divergence(reference, probe_logits(model)))
    assert distances == sorted(distances)
    assert distances[0] < 1e-3 < distances[-1]


def test_vision_is_quantized_when_asked_and_keeps_its_biases(tmp_path: Path) -> None:
    slug = "hqq-w8-g32-vision"
    out = quantized(spec_for(slug), tmp_path / "out")
    model = spec_for(slug).load(out, "cpu")
    fc1 = model.model.vision_tower.encoder.layers[0].mlp.fc1
    assert type(fc1).__name__ == "HQQLinear"
    assert torch.equal(
        fc1.bias, tensors_of(TINY)["vision_tower.encoder.layers.0.mlp.fc1.bias"].float()
    )
    assert type(model.lm_head).__name__ == "Linear"
    base = spec_for("none-fp16")
    reference = probe_logits(base.load(quantized(base, tmp_path / "base"), "cpu"))
    assert kl_divergence(reference, probe_logits(model)) < 1e-3


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "model.language_model.layers.0.mlp.up_proj"
    merged, out = tmp_path / "merged", tmp_path / "out"
    merged.mkdir()
    out.mkdir()
    (merged / "config.json").write_text("{}")
    save_file({f"{name}.weight": torch.zeros(6, 96)}, merged / "model.safetensors")
    with pytest.raises(VariantError, match=r"'hqq-w4-g64': model.* is 6x96, .* smaller group"):
        spec_for("hqq-w4-g64").quantize(merged, out, None, "cpu")  # type: ignore[arg-type]
