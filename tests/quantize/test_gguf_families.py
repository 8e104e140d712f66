"""GGUF of other backbones and tokenizers (D6): the same logits and ids, or why there are none."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import write_family
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_ray.errors import VariantError
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.gguf_parity import check_parity, llama_tokenize
from llava_ray.quantize.gguf_vocab import _REST, _WORDS, check_vocabulary
from llava_ray.quantize.gguf_writer import write_f32_folder
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration

REFUSED = {
    "llama-yarn": "rope_type 'yarn'",
    "mistral-window": "a window of 24 tokens",
    "qwen2-window": "a window of 24 tokens",
    "clip-full": "always drops the class token",
    "clip-two-layers": "one layer only",
    "siglip-full": "always drops the class token",
    "siglip-default": "no place in llama.cpp's LLaVA",
}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-3", "mistral", "qwen2"])
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    write_family(name, tmp_path / "base")
    (tmp_path / "pair").mkdir()
    write_f32_folder(tmp_path / "base", tmp_path / "pair")
    assert check_parity(tmp_path / "base", tmp_path / "pair", tolerance=1e-3) <= 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    write_family(name, tmp_path / "base")
    (tmp_path / "pair").mkdir()
    with pytest.raises(VariantError, match=REFUSED[name]):
        write_f32_folder(tmp_path / "base", tmp_path / "pair")


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: _split(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": lambda: _split(_WORDS + r"\p{N}" + _REST),
}
SPECIAL = ["<image>", "<|im_start|>", "<|im_end|>", "<pad>"]
SCRIPTS = (
    "the quick brown fox don't can't WE'LL", "Straße über Öl café naïve", "Быстрая лиса",
    "快速的棕色狐狸", "いろはにほへと カタカナ", "한국어 텍스트", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "0 12 345 6789 3.14 1,000", "😀👍🏽👨‍👩‍👧",
    "a_b-c/d\\e @x #y $5 100%", "\t \n \r\n  ", "ǅ Ⅷ ½ ² ﬁ",
)  # fmt: skip


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = [piece for script in SCRIPTS for piece in (*script.split(" "), *script)]
    found = []
    for _ in range(count):
        chosen = [draw.choice(pieces) for _ in range(draw.randint(1, 12))]
        found.append("".join(piece + draw.choice(("", " ", "  ", "\n")) for piece in chosen))
    return [text for text in found if text]


def byte_level_model(folder: Path, cut: Any, normalizer: Any = None) -> Path:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer, whole.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        whole.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1020, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    whole.train_from_iterator(texts(2000), trainer)
    write_family("llama", folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = tokenizer.convert_tokens_to_ids(
        "<image>"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_text_like_the_tokenizer(tmp_path: Path, name: str) -> None:
    base = byte_level_model(tmp_path / "base", CUTS[name]())
    (tmp_path / "pair").mkdir()
    write_f32_folder(base, tmp_path / "pair")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    samples = tuple(texts(10_000)) + ("<|im_start|>user\nWhat?<|im_end|>",)
    found = llama_tokenize(tmp_path / "pair" / "llava-f32.gguf", samples)
    differing = [
        (sample, ids, expected.ids)
        for sample, ids, expected in zip(
            samples, found, tokenizer.encode_batch(list(samples)), strict=True
        )
        if ids != expected.ids
    ]
    assert not differing, f"{len(differing)} of {len(samples)}: {differing[:3]}"


def test_a_cut_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    base = byte_level_model(tmp_path / "base", _split(r"\w+|\W"), normalizers.NFC())
    (tmp_path / "pair").mkdir()
    with pytest.raises(VariantError, match="cuts text by .*not known here"):
        write_f32_folder(base, tmp_path / "pair")


def test_rows_that_fall_back_carry_their_own_bits(tmp_path: Path) -> None:
    """D10: 64 columns divide by no K-quant's block of 256, 256 do."""
    write_family("llama-wide", tmp_path / "base")
    spec = spec_for("gguf-q2_k")
    (tmp_path / "out").mkdir()
    spec.quantize(tmp_path / "base", tmp_path / "out", Calibration("", 0), "cpu")
    assert spec.measured_bits(tmp_path / "out") > spec.bits_per_weight() + 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"byte_fallback": True, "vocab": {"a": 0}}, "no tokens <0x00> to <0xFF> for it"),
        ({"end_of_word_suffix": "</w>"}, "tokenizer.json has end_of_word_suffix"),
    ],
)
def test_vocabularies_at_which_llama_cpp_ends_are_refused(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    tree = json.loads((EMBEDDED / "tokenizer.json").read_text())
    tree["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(VariantError, match=reason):
        check_vocabulary(tmp_path)
