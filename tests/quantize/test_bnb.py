"""bitsandbytes: the same bits as transformers' own quantizer, and a folder that it reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_inputs import NO_CALIBRATION, TINY, parameters_of, probe_logits, quantized
from tiny_families import write_family

from llava_ray.quantize.registry import spec_for

LINEARS = 6 * 7


@pytest.mark.parametrize("slug", ["bnb-int8", "bnb-nf4", "bnb-fp4", "bnb-nf4-dq"])
def test_tensors_are_those_of_transformers(slug: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    out = quantized(spec_for(slug), tmp_path / "out")
    four_bit = slug != "bnb-int8"
    config = BitsAndBytesConfig(
        load_in_4bit=four_bit,
        load_in_8bit=not four_bit,
        bnb_4bit_quant_type=slug.split("-")[1] if four_bit else "fp4",
        bnb_4bit_use_double_quant=slug.endswith("-dq"),
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    theirs = LlavaForConditionalGeneration.from_pretrained(
        TINY, quantization_config=config, device_map="cpu", dtype=torch.float16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected, written = parameters_of(tmp_path / "theirs"), parameters_of(out)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name


@pytest.mark.parametrize("slug", ["bnb-int8", "bnb-nf4-dq"])
def test_reload_gives_the_same_logits_as_transformers(slug: str, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    out = quantized(spec_for(slug), tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(out, device_map="cpu").eval()
    expected, found = probe_logits(theirs), probe_logits(spec_for(slug).load(out, "cpu"))
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    # Theirs runs in fp16, ours in fp32; nf4's own distance to the unquantized model is 0.04.
    assert divergence < 2e-3


def types_below(module: Any) -> dict[str, int]:
    names = [type(child).__name__ for child in module.modules()]
    return {name: names.count(name) for name in set(names) if "Linear" in name}


def test_only_the_language_model_is_quantized(tmp_path: Path) -> None:
    model = spec_for("bnb-nf4").load(quantized(spec_for("bnb-nf4"), tmp_path / "out"), "cpu")
    assert types_below(model) == {"Linear4bit": LINEARS, "Linear": 7 * 6 + 2 + 1}
    assert model.lm_head.weight.dtype == torch.float32


def test_vision_is_quantized_when_asked(tmp_path: Path) -> None:
    slug = "bnb-nf4-vision"
    model = spec_for(slug).load(quantized(spec_for(slug), tmp_path / "out"), "cpu")
    assert types_below(model) == {"Linear4bit": LINEARS + 7 * 6 + 2, "Linear": 1}


@pytest.mark.parametrize("slug", ["bnb-nf4-vision", "bnb-int8-vision"])
def test_a_tower_with_a_head_opens(slug: str, tmp_path: Path) -> None:
    write_family("siglip-full", tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    spec_for(slug).quantize(tmp_path / "base", out, NO_CALIBRATION, "cpu")
    model = spec_for(slug).load(out, "cpu")
    assert "4bit" in type(model.model.vision_tower.encoder.layers[0].mlp.fc1).__name__.lower() or (
        slug == "bnb-int8-vision"
    )
