"""A Hugging Face tokenizer.json as llama.cpp's SentencePiece-style vocabulary.

llama.cpp joins the neighbours whose token has the highest score, leftmost first; BPE joins those
of the lowest merge rank. With score = -rank both cut text the same way.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from llava_ray.errors import VariantError
from llava_ray.inference.prompts import eos_token_id
from llava_ray.models.chat_template import (
    PLAIN_CONTENTS,
    VICUNA_TEMPLATE,
    TokenizersOwn,
    chat_template,
)

logger = logging.getLogger(__name__)

SPACE = "▁"


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Add tokenizer.json's tokens to a text model's header, padded to `size`, the embedding's rows.

    Raises VariantError for a tokenizer that is neither of Llama's kind (BPE with byte fallback over
    text whose spaces are '▁') nor a BPE of bytes whose way to cut text llama.cpp knows.
    """
    from transformers import AutoTokenizer

    tree = _read_tree(folder)
    model = tree["model"]
    of_bytes = not model.get("byte_fallback")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index] = token
        types[index] = int(TokenType.NORMAL if of_bytes else _type_of(token))
    for added in tree.get("added_tokens", []):
        index = added["id"]
        if index >= size:
            raise VariantError(
                f"token {added['content']!r} has id {index}, but the embedding has {size} rows"
            )
        tokens[index] = added["content"]
        types[index] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if of_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tree))
        merges = model["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    else:
        if ids["unk"] is not None:
            types[ids["unk"]] = int(TokenType.UNKNOWN)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, types, model["merges"]))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(first == ids["bos"])
    writer.add_add_eos_token(False)
    template = chat_template(tokenizer)
    is_own = isinstance(template, TokenizersOwn)
    if is_own:
        writer.add_eot_token_id(eos_token_id(tokenizer))
    # llama.cpp gives a template that knows text alone just that.
    own = tokenizer.get_chat_template().removeprefix(PLAIN_CONTENTS) if is_own else VICUNA_TEMPLATE
    writer.add_chat_template(own)


def check_vocabulary(folder: Path) -> None:
    """Raise VariantError as `add_vocabulary` does, but for what hangs on the embedding's rows."""
    tree = _read_tree(folder)
    normalizer, cut = tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}
    kinds = {each["type"] for each in normalizer.get("normalizers", [normalizer]) if each}
    if unknown := kinds - _NORMALIZERS:
        raise VariantError(
            f"tokenizer.json changes text by {', '.join(sorted(unknown))}, which llama.cpp does not"
        )
    if "NFC" in kinds or cut.get("prepend_scheme") == "first":
        _say_of_other_ids("accents that stand alone" if "NFC" in kinds else "after special tokens")
    vocabulary, cuts = tree["model"]["vocab"], json.dumps(cut)
    if tree["model"].get("byte_fallback"):
        if "<0x00>" not in vocabulary or "<0xFF>" not in vocabulary or "ByteLevel" in cuts:
            raise VariantError(
                "tokenizer.json has byte_fallback, and no tokens <0x00> to <0xFF> for it or a "
                "ByteLevel that leaves it nothing: llama.cpp ends there; set it to false"
            )
    else:
        _pre_tokenizer(tree)
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if tree["model"].get(key):
            raise VariantError(f"tokenizer.json has {key}, which llama.cpp does not know")


@functools.cache
def _say_of_other_ids(where: str) -> None:
    logger.warning(
        "gguf: llama.cpp's own tools cut some texts otherwise than this tokenizer (%s); the engine "
        "here gives it the tokenizer's ids", where,
    )  # fmt: skip


_NORMALIZERS = frozenset({"Prepend", "Replace", "NFC"})
"""The first two are SentencePiece's marks for spaces."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = ("ByteLevel",)
_PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    _GPT_2: "gpt-2",
    ("Digits", *_GPT_2): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
}
"""llama.cpp's names (src/llama-vocab.cpp) by what cuts text in tokenizer.json: a pattern, digits
one by one, or GPT-2's pattern, which ByteLevel has built in."""


def _pre_tokenizer(tree: dict[str, Any]) -> str:
    step = tree.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    found = []
    for each in steps:
        kind = each.get("type")
        if kind == "Split" and each.get("behavior") == "Isolated" and not each.get("invert"):
            found.append(str(each["pattern"].get("Regex")))
        elif kind == "Digits" and each.get("individual_digits"):
            found.append(kind)
        elif kind == "ByteLevel" and each.get("add_prefix_space"):
            found.append("a prefix space")
        elif kind != "ByteLevel" or each.get("use_regex", True):
            found.append(str(kind))
    if tuple(found) not in _PRE_TOKENIZERS:
        raise VariantError(
            f"tokenizer.json cuts text by {found}: llama.cpp's names for that are not known here"
        )
    return _PRE_TOKENIZERS[tuple(found)]


def _read_tree(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise VariantError(f"no tokenizer.json in {folder}: GGUF needs the fast tokenizer's file")
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if tree["model"].get("type") != "BPE":
        raise VariantError(f"tokenizer.json holds {tree['model'].get('type')}: GGUF needs BPE")
    return tree


def _type_of(token: str) -> TokenType:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """Return minus the rank of the first merge that makes each token; letters come last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    scores, unreachable = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        normal = kind == TokenType.NORMAL
        if normal and len(token) > 1 and token not in ranks:
            unreachable.append(token)
        scores.append(-float(ranks.get(token, len(merges) + index)) if normal else 0.0)
    if unreachable:
        logger.warning(
            "%d tokens are made by no merge, such as %r: llama.cpp may use them where the "
            "tokenizer does not",
            len(unreachable),
            unreachable[0],
        )
    return scores
