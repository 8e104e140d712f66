"""What others read beside merged weights: E1, E8, and where answers end."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_families import write_family

from llava_ray.merge.beside import carry, pixel_differences
from llava_ray.models.folder import EMBEDDED


@pytest.mark.parametrize("name", ["llama", "siglip-full", "llava-next"])
def test_transformers_makes_the_pixels_that_are_trained_on(name: str, tmp_path: Path) -> None:
    """E1"""
    write_family(name, tmp_path / "base")
    out = tmp_path / "merged"
    out.mkdir()
    shutil.copy(tmp_path / "base" / "config.json", out)
    carry(tmp_path / "base", out)
    # A long picture is averaged down before it is padded, which moves a value by one step.
    assert max(pixel_differences(out).values()) <= 1


def test_the_embedded_model_has_the_pixels_exactly(tmp_path: Path) -> None:
    """E1"""
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    carry(EMBEDDED, tmp_path)
    assert set(pixel_differences(tmp_path).values()) == {0.0}


def test_older_readers_find_a_tokenizer_they_know(tmp_path: Path) -> None:
    """E8"""
    shutil.copytree(EMBEDDED, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    tree |= {"extra_special_tokens": ["<pad>"], "tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(tree))
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    carry(tmp_path / "base", tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in found
    assert found["additional_special_tokens"] == ["<pad>"]
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["model_input_names"] == ["input_ids", "attention_mask"]
