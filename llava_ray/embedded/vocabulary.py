"""The tokenizer of the embedded model: whole tokens for caption words, letters for the rest.

It is a Llama tokenizer (BPE over '▁'-prefixed text with byte fallback) whose merges only ever
extend a word's beginning: '▁s' + 'i', '▁si' + 'g', ... So a quoted word, which has no '▁' before
it, is always spelled letter by letter, and any word can be read exactly. llama.cpp's SPM
tokenizer, scored by merge rank, cuts text the same way.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE

from llava_ray.models.folder import EMBEDDED

VOCAB_SIZE = 1024
EOS_ID, IMAGE_ID = 2, 1022

SPECIAL = ("<unk>", "<s>", "</s>")
ADDED = ("<image>", "<pad>")
SPACE = "▁"
FILLERS = (
    "person people man woman child wearing holding standing sitting hand large small shows showing "
    "written painted printed handwritten next to above below behind between under over by from for "
    "as or be has have can into out up down light dark blurred table window door building tree car "
    "road food bottle glass cup plate paper page book line lines number numbers time day water sky "
    "grass house room floor part view scene photo photograph picture appears including "
    "several some other another each both two three four one half round square metal wood stone"
)
"""Words of captions about photographs; they fill what generated captions leave of the tokens."""

_QUOTED = re.compile(r'"[^"]*"\S*')
CHARACTERS = SPACE + string.ascii_letters + string.digits + string.punctuation


def choose_pieces(captions: Iterable[str]) -> list[str]:
    """Return the multi-character tokens in the order of their merges.

    Words outside quotes, and the fillers once each, are taken by the tokens they save; each needs
    all of its beginnings as tokens, shared with other words.
    """
    # The quote mark itself counts as a word, so that its space costs no token.
    words = Counter({'"', *FILLERS.split()})
    for caption in captions:
        words.update(_QUOTED.sub(' " ', caption).split())
    bytes_and_letters = len(SPECIAL) + 256 + len(CHARACTERS) + len(ADDED)
    room = VOCAB_SIZE - bytes_and_letters
    pieces: list[str] = []
    gain = {
        word: count * len(word) for word, count in words.items() if set(word) <= set(CHARACTERS)
    }
    for word in sorted(gain, key=lambda word: (-gain[word], word)):
        beginnings = (SPACE + word[:end] for end in range(1, len(word) + 1))
        pieces += [piece for piece in beginnings if piece not in pieces]
    assert len(pieces) >= room, f"{len(pieces)} pieces for {room} tokens: give more words"
    return sorted(pieces[:room], key=len)


def train(captions: Iterable[str]) -> Tokenizer:
    """Return the shipped tokenizer with its multi-character tokens chosen anew."""
    pieces = choose_pieces(captions)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *pieces]
    tokenizer = load()
    tokenizer.model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(piece[:-1], piece[-1]) for piece in pieces],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def load() -> Tokenizer:
    """Load the shipped tokenizer without transformers."""
    return Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
