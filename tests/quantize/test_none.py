"""The baseline: nothing but the dtype changes."""

import json
from pathlib import Path

import pytest
import torch
from quantize_inputs import TINY, parameters_of, probe_logits, quantized, tensors_of

from llava_ray.errors import ArtifactError
from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.registry import spec_for


@pytest.mark.parametrize(
    ("slug", "dtype"), [("none-bf16", torch.bfloat16), ("none-fp32", torch.float32)]
)
def test_every_weight_is_cast(slug: str, dtype: torch.dtype, tmp_path: Path) -> None:
    out = quantized(spec_for(slug), tmp_path / "out")
    expected = {name: value.to(dtype) for name, value in parameters_of(TINY).items()}
    written = parameters_of(out)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name
    tree = json.loads((out / "config.json").read_text())
    assert tree["dtype"] == str(dtype).removeprefix("torch.")


def test_own_loader_gives_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    out = quantized(spec_for("none-fp16"), tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    ours = spec_for("none-fp16").load(out, "cpu")
    assert torch.equal(probe_logits(ours), probe_logits(theirs))


def test_several_shards_have_an_index_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_folder, "SHARD_BYTES", 5_000_000)
    out = quantized(spec_for("none-fp16"), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert len(files) == 5
    assert set(index["weight_map"].values()) == files
    assert tensors_of(out).keys() == index["weight_map"].keys()
    whole = quantized(spec_for("none-fp16"), tmp_path / "whole")
    ours = probe_logits(spec_for("none-fp16").load(out, "cpu"), images=False)
    assert torch.equal(ours, probe_logits(spec_for("none-fp16").load(whole, "cpu"), images=False))


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = quantized(spec_for("none-fp16"), tmp_path / "out")
    values = tensors_of(out)
    del values["language_model.model.norm.weight"]
    save_file(values, out / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"1 weights are missing.*language_model\.norm"):
        spec_for("none-fp16").load(out, "cpu")


@pytest.mark.parametrize(
    ("stored", "module"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_names_of_both_transformers_generations_are_known(stored: str, module: str) -> None:
    assert llava_folder.module_name(stored) == module
