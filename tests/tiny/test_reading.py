import pytest

from llava_ray.tiny.reading import character_error_rate, quoted_words, word_recall


def test_only_quoted_words_count() -> None:
    assert quoted_words('A "RED Sign" and a box “open”.') == ["RED", "Sign", "open"]
    assert word_recall("It says OPEN", ["OPEN"]) == 0


@pytest.mark.parametrize(
    ("text", "words", "recall"),
    [
        ('says "OPEN"', ["OPEN"], 1.0),
        ('says "Open"', ["OPEN"], 0.0),
        ('"a b" "c"', ["a", "b", "x", "c"], 0.75),
        ('"tea"', ["tea", "tea"], 0.5),
        ("", [], 1.0),
    ],
)
def test_recall_is_exact_and_counts_repeats(text: str, words: list[str], recall: float) -> None:
    assert word_recall(text, words) == recall


@pytest.mark.parametrize(
    ("text", "words", "rate"),
    [
        ('"OPEN"', ["OPEN"], 0.0),
        ('"OPEM"', ["OPEN"], 0.25),
        ("nothing", ["OPEN"], 1.0),
        ('"OPENOPEN"', ["OPEN"], 1.0),
    ],
)
def test_character_error_rate_counts_edits(text: str, words: list[str], rate: float) -> None:
    assert character_error_rate(text, words) == rate
