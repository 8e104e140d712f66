"""GGUF pairs: every type is written, every tensor has its place, text is cut alike."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_inputs import WEIGHTS, change_config, small_model, write_f32
from quantize_inputs import NO_CALIBRATION
from safetensors.torch import load_file, save_file

from llava_ray.errors import VariantError
from llava_ray.inference.engine import Prompt
from llava_ray.inference.llama_cpp.types import FILE_TYPES, NEEDS_IMATRIX, PLAIN, expected_bits
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.gguf import measured_bits_per_weight, quantize_file
from llava_ray.quantize.gguf_parity import (
    TEXTS,
    check_parity,
    check_tokenization,
    llama_tokenize,
    probe_picture,
)
from llava_ray.quantize.gguf_writer import lossless_precision, permute_heads, write_pair
from llava_ray.quantize.registry import spec_for

pytest.importorskip("llama_cpp", reason="needs 'pip install llava_ray[gguf]'")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("small") / "merged")


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a copy of the small model to change, and its tensors."""
    target = tmp_path / "merged"
    shutil.copytree(small, target)
    return target, load_file(target / WEIGHTS)


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as an F32 pair."""
    return write_f32(small, tmp_path_factory.mktemp("pair") / "f32")


def test_logits_of_the_embedded_models_pair_are_its_own(tmp_path: Path) -> None:
    assert check_parity(EMBEDDED, write_f32(EMBEDDED, tmp_path / "pair")) < 1e-4


SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "grouped heads": {"text_config": {"num_key_value_heads": 2}},
    "tied": {"top": {"tie_word_embeddings": True}, "text_config": {"tie_word_embeddings": True}},
    "rope base": {"text_config": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
    "gelu": {"vision_config": {"hidden_act": "gelu"}},
    "last layer": {"top": {"vision_feature_layer": -1}},
    "first layer": {"top": {"vision_feature_layer": 1}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_llavas_of_other_shapes_keep_parity(shape: str, tmp_path: Path) -> None:
    merged = small_model(tmp_path / "merged", **SHAPES[shape])
    assert check_parity(merged, write_f32(merged, tmp_path / "pair")) < 1e-3


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_config", {"hidden_act": "gelu"}),
        (None, {"vision_feature_layer": -1}),
        ("text_config", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ],
)
def test_the_gate_tells_a_wrong_header(
    part: str | None, values: dict[str, Any], copied: Any, pair: Path
) -> None:
    merged, _ = copied
    change_config(merged, part, **values)
    with pytest.raises(VariantError, match="logits differ"):
        check_parity(merged, pair)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.self_attn.k_proj.weight",
        "vision_tower.embeddings.class_embedding",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_the_gate_tells_a_wrong_tensor(name: str, copied: Any, pair: Path) -> None:
    merged, tensors = copied
    tensors[name] = tensors[name].flip(0) + 1
    save(tensors, merged)
    with pytest.raises(VariantError, match="logits differ"):
        check_parity(merged, pair)


def test_bf16_weights_are_kept_bit_for_bit(copied: Any, tmp_path: Path) -> None:
    merged, tensors = copied
    save({name: value.bfloat16() for name, value in tensors.items()}, merged)
    assert lossless_precision(merged) == "bf16"
    write_pair(merged, tmp_path / "t.gguf", tmp_path / "m.gguf", precision="bf16")
    found = {t.name: t.data for t in GGUFReader(tmp_path / "t.gguf").tensors}
    expected = tensors["language_model.lm_head.weight"].bfloat16()
    assert found["output.weight"].tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert check_parity(merged, write_f32(merged, tmp_path / "pair")) < 1e-3


def test_names_of_older_transformers_are_read(copied: Any, small: Path, tmp_path: Path) -> None:
    merged, tensors = copied
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in tensors.items()
    }
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save(renamed, merged)
    write_pair(merged, tmp_path / "a.gguf", tmp_path / "mmproj-a.gguf", precision="f16")
    write_pair(small, tmp_path / "b.gguf", tmp_path / "mmproj-b.gguf", precision="f16")
    for kind in ("", "mmproj-"):
        a, b = ((tmp_path / f"{kind}{letter}.gguf").read_bytes() for letter in "ab")
        assert a == b


def test_clip_above_the_selected_layer_is_left_out(pair: Path) -> None:
    names = {tensor.name for tensor in GGUFReader(pair / "mmproj-f32.gguf").tensors}
    assert "v.blk.1.ln1.weight" in names
    assert not any(name.startswith(("v.blk.2.", "v.post_ln", "mm.1.")) for name in names)
    assert {"mm.0.weight", "mm.2.bias", "v.class_embd", "v.patch_embd.weight"} <= names


def test_f16_holds_the_f16_weights_bit_for_bit(small: Path, tmp_path: Path) -> None:
    assert lossless_precision(small) == "f16"
    write_pair(small, tmp_path / "t.gguf", tmp_path / "m.gguf", precision="f16")
    found = {t.name: t.data for t in GGUFReader(tmp_path / "t.gguf").tensors}
    weights = load_file(small / WEIGHTS)
    gate = weights["language_model.model.layers.1.mlp.gate_proj.weight"]
    assert np.array_equal(found["blk.1.ffn_gate.weight"], gate.numpy())
    query = weights["language_model.model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(found["blk.1.attn_q.weight"], permute_heads(query, 4).numpy())


def test_permuted_heads_interleave_both_halves() -> None:
    rows = torch.arange(8)[:, None]
    assert permute_heads(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_unknown_and_missing_tensors_are_named(copied: Any, tmp_path: Path) -> None:
    merged, tensors = copied
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)
    save(tensors, merged)
    paths = tmp_path / "t.gguf", tmp_path / "m.gguf"
    with pytest.raises(VariantError, match=r"1 tensors have no place.*layers.0.self_attn.q_proj"):
        write_pair(merged, *paths, precision="f16")
    del tensors["language_model.model.layers.0.self_attn.q_proj.bias"]
    del tensors["multi_modal_projector.linear_2.bias"]
    save(tensors, merged)
    with pytest.raises(VariantError, match=r"1 tensors are missing.*linear_2.bias"):
        write_pair(merged, *paths, precision="f16")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"vision_feature_layer": [-2, -3]}, "one layer only"),
        (None, {"vision_feature_select_strategy": "full"}, "class token"),
        (None, {"projector_hidden_act": "relu"}, "mlp has gelu"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    part: str | None, values: dict[str, Any], message: str, copied: Any, tmp_path: Path
) -> None:
    merged, _ = copied
    change_config(merged, part, **values)
    with pytest.raises(VariantError, match=message):
        write_pair(merged, tmp_path / "t.gguf", tmp_path / "m.gguf", precision="f16")


def test_values_beyond_f16_are_refused(copied: Any, tmp_path: Path) -> None:
    merged, tensors = copied
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save(tensors, merged)
    with pytest.raises(VariantError, match=r"up_proj.weight has values up to"):
        write_pair(merged, tmp_path / "t.gguf", tmp_path / "m.gguf", precision="f16")


def test_llama_cpp_cuts_text_as_the_tokenizer_does(pair: Path) -> None:
    assert check_tokenization(pair / "llava-f32.gguf") == []
    tokenizer_ids = llama_tokenize(pair / "llava-f32.gguf", TEXTS)
    assert all(ids[0] == 1 for ids in tokenizer_ids)
    assert len(tokenizer_ids[0]) > 5


def test_differing_cuts_are_named(pair: Path, tmp_path: Path, caplog: Any) -> None:
    for name in ("llava-f32.gguf", "tokenizer.json"):
        shutil.copy(pair / name, tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"] = []
    path.write_text(json.dumps(tree))
    with caplog.at_level(logging.WARNING):
        differing = check_tokenization(tmp_path / "llava-f32.gguf")
    assert TEXTS[0] in differing
    assert "llama.cpp cuts" in caplog.text


@pytest.mark.parametrize("name", [n for n in FILE_TYPES if n not in (*NEEDS_IMATRIX, *PLAIN)])
def test_every_type_is_written_at_its_bits(name: str, pair: Path, tmp_path: Path) -> None:
    target = tmp_path / "llava.gguf"
    quantize_file(pair / "llava-f32.gguf", target, FILE_TYPES[name])
    # Mixtures depend on the number of layers, which is 2 here and 32 there.
    assert measured_bits_per_weight(target) == pytest.approx(expected_bits(name), rel=0.15)


@pytest.mark.parametrize("name", NEEDS_IMATRIX)
def test_the_types_that_need_a_matrix_do(name: str, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="importance matrix"):
        quantize_file(pair / "llava-f32.gguf", tmp_path / "llava.gguf", FILE_TYPES[name])


def test_a_variant_runs_and_stays_near_the_model(small: Path, pair: Path, tmp_path: Path) -> None:
    spec = spec_for("gguf-q8_0")
    spec.quantize(small, tmp_path, NO_CALIBRATION, "cpu")
    assert sorted(p.name for p in tmp_path.glob("*.gguf")) == ["llava-q8_0.gguf", "mmproj-f16.gguf"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    rows = []
    for folder in (tmp_path, pair):
        engine = spec.open_engine(folder, device="cpu", slots=1, context=256)
        ids = engine.tokenizer("USER: " + "<image>" * engine.family.vision.tokens)["input_ids"]
        image = engine.family.pixels(probe_picture(engine.family.vision.image_size))
        prompt = Prompt(tuple(ids), (image,))
        rows.append(engine.score(prompt, [40, 41, 42]).log_softmax(-1))
        engine.close()
    divergence = (rows[1].exp() * (rows[1] - rows[0])).sum(-1)
    assert 0 < divergence.max() < 1e-2


@pytest.mark.parametrize("slug", ["gguf-f16", "gguf-q4_k_m", "gguf-q2_k"])
def test_sizes_are_estimated(slug: str, small: Path, tmp_path: Path) -> None:
    spec = spec_for(slug)
    spec.quantize(small, tmp_path, NO_CALIBRATION, "cpu")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    assert spec.estimated_bytes(small) == pytest.approx(size, rel=0.15)


def test_rows_that_no_block_divides_are_refused(copied: Any, tmp_path: Path) -> None:
    merged, tensors = copied
    save({name: value[..., :96].contiguous() for name, value in tensors.items()}, merged)
    spec = spec_for("gguf-q4_k_m")
    with pytest.raises(VariantError, match=r"rows of \[96\] weights do not divide by 256"):
        spec.quantize(merged, tmp_path / "out", NO_CALIBRATION, "cpu")


def test_types_are_those_of_llama_cpp() -> None:
    import llama_cpp

    for name, value in FILE_TYPES.items():
        prefix = "ALL" if name == "f32" else "MOSTLY"
        assert getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{name.upper()}") == value
