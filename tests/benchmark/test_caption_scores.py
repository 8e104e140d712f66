"""Caption scores, against figures by hand and of coco-caption."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_ray.benchmark import caption_scores

REFERENCES = [
    "a red sign that reads open late on a brick wall",
    "a white label with the words fresh bread",
    "a blue billboard that says drive slow near the road",
    "a green poster reading live music tonight",
]
TEXTS = [
    "a red sign that reads open late",
    "a white label with the words fresh milk and bread",
    "a blue sign near the road",
    "a green poster reading live music tonight",
]


def test_cider_d_is_that_of_coco_caption() -> None:
    # pycocoevalcap 1.2, CiderScorer, one reference each.
    each = [6.05514317, 7.15175739, 2.40149148, 10.0]
    assert caption_scores.cider_d(REFERENCES, TEXTS) == pytest.approx(sum(each) / 4, abs=1e-7)


def test_cider_d_of_a_single_pair_is_zero_because_every_word_is_in_every_document() -> None:
    assert caption_scores.cider_d(["a sign"], ["a sign"]) == 0


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    # 3 of 4 words in common on both sides.
    assert caption_scores.rouge_l(["a red metal sign"], ["a blue metal sign"]) == pytest.approx(
        0.75
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('A sign reads "OPEN Late!".', ["open", "late"]),
        ("It says “Fresh bread” and ‘Now’.", ["fresh", "bread", "now"]),
        ("The label says 'DON'T WALK' here.", ["don't", "walk"]),
        ("It's the shop's door.", []),
        ('An empty "" and "--".', []),
    ],
)
def test_quoted_words(text: str, expected: list[str]) -> None:
    assert caption_scores.quoted_words(text) == expected


def test_word_recall_counts_repeated_words_as_often_as_they_are_quoted() -> None:
    assert caption_scores.word_recall(['says "GO GO GO STOP"'], ['says "Go, go" now']) == 0.5


def test_character_error_rate_takes_the_nearest_word_of_the_text() -> None:
    # BREAD against BREAK is one edit in five characters; LATE is not there at all.
    assert caption_scores.character_error_rate(['"BREAD"'], ['a "BREAK" sign']) == pytest.approx(
        0.2
    )
    assert caption_scores.character_error_rate(['"BREAD LATE"'], [""]) == 1
    assert caption_scores.character_error_rate(['"BREAD"'], ["Bread."]) == 0


def test_scores_of_words_are_left_out_where_nothing_is_quoted() -> None:
    assert set(caption_scores.caption_scores(["a sign"], ["a sign"])) == {"rouge_l", "cider_d"}


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    distance = caption_scores.edit_distance
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


texts = st.text("ab \"'“”c", max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_scores_stay_in_their_ranges(pairs: list[tuple[str, str]]) -> None:
    scores = caption_scores.caption_scores([a for a, _ in pairs], [b for _, b in pairs])
    assert all(0 <= value <= (10.000001 if name == "cider_d" else 1) and math.isfinite(value)
               for name, value in scores.items())  # fmt: skip
