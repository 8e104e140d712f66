"""Checkpoints in the layout of LLaVA's own repository, both ways (D5)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED, model_folder
from llava_ray.models.original import is_original, write_original
from llava_ray.models.tensors import file_name, module_name
from llava_ray.preflight import check_model

NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
"""llava-hf's names and LLaVA's own, by transformers' convert_llava_weights_to_hf.py."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))


def theirs(folder: Path, tower: Path) -> dict[str, torch.Tensor]:
    """Write the embedded model in LLaVA's own layout by hand, its tower apart; return the rest."""
    folder.mkdir()
    tower.mkdir()
    tree = json.loads((EMBEDDED / "config.json").read_text())
    text = tree["text_config"]
    config = {
        **{key: value for key, value in text.items() if isinstance(value, int | float)},
        "model_type": "llava_llama", "hidden_act": "silu", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch", "mm_vision_tower": str(tower),
        "mm_vision_select_layer": tree["vision_feature_layer"], "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps({"vision_config": tree["vision_config"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    found, seen = {}, {}
    for stored, value in load_file(EMBEDDED / "model.safetensors").items():
        name = file_name(module_name(stored))
        if name.startswith("vision_tower."):
            seen[name.removeprefix("vision_tower.")] = value
            continue
        for hf, own in NAMES:
            name = own + name.removeprefix(hf) if name.startswith(hf) else name
        found[name] = value
    save_file(seen, tower / "model.safetensors")
    return found


def save_bins(weights: dict[str, torch.Tensor], folder: Path) -> None:
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        path = folder / f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, path)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    family = family_of(folder)
    image = family.pixels(Image.linear_gradient("L").convert("RGB").resize((300, 200)))
    ids = [1, *[family.vision.image_token_id] * image.num_tokens, 40, 41, 42]
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids]), **family.inputs([image])).logits
    return found


def opened(folder: Path) -> Path:
    config = load_config(None, [f"model.path={folder}"])
    found = model_folder(config.model)
    check_model(config, found)
    return found


def test_a_full_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    folder = tmp_path / "llava-v1.5"
    save_bins(theirs(folder, tmp_path / "clip"), folder)
    found = opened(folder)
    assert torch.equal(logits(found), logits(EMBEDDED))
    assert opened(folder) == found, "converted once"


def test_a_lora_is_folded_into_its_base(tmp_path: Path) -> None:
    base, lora = tmp_path / "vicuna", tmp_path / "llava-lora"
    weights = theirs(lora, tmp_path / "clip")
    shutil.copytree(lora, base)
    projector = {name: value for name, value in weights.items() if "mm_projector" in name}
    save_bins({name: v for name, v in weights.items() if name not in projector}, base)
    torch.save(
        {f"base_model.model.{name}": value for name, value in projector.items()},
        lora / "non_lora_trainables.bin",
    )
    settings = {"base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    layer = "model.layers.1.mlp.down_proj"
    rows, columns = weights[f"{layer}.weight"].shape
    torch.manual_seed(0)
    a, b = 0.1 * torch.randn(4, columns), 0.1 * torch.randn(rows, 4)
    names = (f"base_model.model.{layer}.lora_{each}.weight" for each in "AB")
    torch.save(dict(zip(names, (a, b), strict=True)), lora / "adapter_model.bin")

    expected = tmp_path / "expected"
    shutil.copytree(EMBEDDED, expected)
    stored = load_file(EMBEDDED / "model.safetensors")
    name = next(
        each
        for each in stored
        if each.endswith("language_model.layers.1.mlp.down_proj.weight")
        or each.endswith("language_model.model.layers.1.mlp.down_proj.weight")
    )
    stored[name] = (stored[name].float() + 2 * (b @ a)).to(stored[name].dtype)
    save_file(stored, expected / "model.safetensors")
    assert torch.equal(logits(opened(lora)), logits(expected))
    assert not torch.equal(logits(expected), logits(EMBEDDED))


def test_what_is_written_in_their_layout_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "own"
    write_original(EMBEDDED, out)
    assert is_original(out) and not is_original(EMBEDDED)
    stored = load_file(out / "model.safetensors")
    assert {"model.embed_tokens.weight", "model.mm_projector.2.bias"} <= stored.keys()
    assert torch.equal(logits(opened(out)), logits(EMBEDDED))
    with pytest.raises(ConfigError, match="is there already"):
        write_original(EMBEDDED, out)


class Code:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not one of llava, llava_llama"),
        ({"mm_vision_tower": "no/such/tower"}, "no/such/tower"),
        ("no weights", "no weights in "),
        ("no fast tokenizer", "has tokenizer.model alone: pip install sentencepiece, or copy"),
        ("code", "it is no checkpoint of LLaVA"),
        ("no projector", "no mm_projector among its weights"),
    ],
)
def test_what_is_neither_layout_is_one_line(
    wrong: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llava"
    weights = theirs(folder, tmp_path / "clip")
    if wrong == "no projector":
        weights = {name: value for name, value in weights.items() if "mm_proj" not in name}
    if wrong == "code":
        torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    elif wrong == "no fast tokenizer":
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    elif wrong != "no weights":
        save_bins(weights, folder)
    if isinstance(wrong, dict):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ConfigError) as caught:
        opened(folder)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out
    assert not [*(tmp_path / "cache" / "converted").glob("*")]
