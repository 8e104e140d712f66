import random
import string

import pytest

from llava_ray.embedded import vocabulary
from llava_ray.embedded.captions import DESCRIBE
from llava_ray.embedded.pretrain.examples import Encoder
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample, encode_sample
from llava_ray.models.folder import EMBEDDED


def test_quoted_words_are_spelled_letter_by_letter() -> None:
    tokenizer = vocabulary.load()
    rng = random.Random(0)
    for _ in range(50):
        word = "".join(rng.choices(string.ascii_letters + string.digits, k=7))
        tokens = tokenizer.encode(f'It says "{word}".', add_special_tokens=False).tokens
        assert tokens[-9:-2] == list(word)


@pytest.mark.parametrize("text", ["café 12 °C", 'A "sign", 5.50$', "新しい", "a\nb"])
def test_any_text_comes_back(text: str) -> None:
    tokenizer = vocabulary.load()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_merges_only_extend_beginnings_of_words() -> None:
    pieces = [token for token in vocabulary.load().get_vocab() if len(token) > 1]
    special = (*vocabulary.SPECIAL, *vocabulary.ADDED)
    for piece in pieces:
        assert piece.startswith(vocabulary.SPACE) or piece in special or piece.startswith("<0x")


def test_ids_match_the_shapes_of_the_model() -> None:
    tokenizer = vocabulary.load()
    assert tokenizer.get_vocab_size() == vocabulary.VOCAB_SIZE == 1024
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))
    ids = [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>")]
    assert ids == [0, 1, 2, vocabulary.IMAGE_ID, 1023]


def test_packed_ids_are_those_of_the_conversation_format() -> None:
    from transformers import AutoTokenizer

    encoder = Encoder()
    answer = 'There is a red sign that says "OPEN Daily".'
    packed = encoder.pack([(DESCRIBE, answer)])
    ids, weights, segments = packed["ids"], packed["weights"], packed["segments"]
    length = int((segments > 0).sum())
    sample = Sample("0", ("",), (Turn(DESCRIBE, 1, answer),))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    encoded = encode_sample(tokenizer, sample, [2], max_length=999)
    wanted, labels = encoded.input_ids, encoded.labels
    assert encoder.prefix() + [vocabulary.IMAGE_ID] * 2 + ids[:length].tolist() == wanted
    assert (weights[:length] > 0).tolist() == [label >= 0 for label in labels[-length:]]
    tokens = [encoder.tokenizer.id_to_token(i) for i, w in zip(ids, weights, strict=True) if w > 1]
    assert "".join(tokens) == 'OPEN▁Daily"'
