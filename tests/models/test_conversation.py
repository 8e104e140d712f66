import pytest
from transformers import AutoTokenizer

from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import (
    IGNORE_INDEX,
    Sample,
    encode_prompt,
    encode_sample,
)
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED

SHAPE = family_of(EMBEDDED).vision


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(EMBEDDED)


def test_only_the_answer_and_its_end_carry_loss(tokenizer) -> None:  # type: ignore[no-untyped-def]
    sample = Sample("1", ("a.jpg",), (Turn("What?", 1, "A red sign."),))
    encoded = encode_sample(tokenizer, sample, [SHAPE.tokens], max_length=2048)
    ids, labels = encoded.input_ids, encoded.labels
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    assert tokenizer.decode(supervised).strip() == "A red sign.</s>"
    assert supervised[-1] == tokenizer.eos_token_id
    assert ids.count(SHAPE.image_token_id) == SHAPE.tokens


def test_a_literal_image_token_in_text_is_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = encode_prompt(tokenizer, [Turn("I typed <image> and </s>", 1)], [5])
    assert ids.count(SHAPE.image_token_id) == 5
    assert tokenizer.eos_token_id not in ids


def test_long_samples_are_cut(tokenizer) -> None:  # type: ignore[no-untyped-def]
    sample = Sample("1", ("a.jpg",), (Turn("What?", 1, "word " * 500),))
    encoded = encode_sample(tokenizer, sample, [4], max_length=64)
    assert len(encoded.input_ids) == len(encoded.labels) == 64 and encoded.num_images == 1


def test_a_cut_inside_of_an_image_leaves_none_of_it(tokenizer) -> None:  # type: ignore[no-untyped-def]
    sample = Sample("1", ("a.jpg", "b.jpg"), (Turn("What?", 2, "Two signs."),))
    encoded = encode_sample(tokenizer, sample, [5, 40], max_length=30)
    assert encoded.num_images == 1
    assert encoded.input_ids.count(SHAPE.image_token_id) == 5
    assert encoded.input_ids[-1] != SHAPE.image_token_id


def test_a_row_reads_back_as_it_was_written() -> None:
    turns = (Turn("Describe.", 2, "Signs."), Turn("And?", 0, "No."))
    sample = Sample("7", ("a.jpg", "b.jpg"), turns, "Be brief.")
    assert Sample.from_llava(sample.as_llava()) == sample
    with pytest.raises(ValueError, match="names 1 images, shows 2"):
        Sample.from_llava(sample.as_llava() | {"image": "a.jpg"})
