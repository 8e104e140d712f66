"""The split: the share that was asked for, and no picture on both sides (C7, G2)."""

import hashlib
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.prepare.rows import Row
from llava_ray.prepare.split import Shown

SHARES = st.floats(0, 1)


def row(number: int, pictures: tuple[int, ...]) -> Row:
    names = tuple(f"{picture}.png" for picture in pictures)
    turns = (Turn(f"Question {number}", len(pictures), "Yes."),)
    pixels = tuple(hashlib.sha256(name.encode()).hexdigest()[:32] for name in names)
    return Row(number, Sample("x", names, turns), pixels=pixels)


def split_rows(rows: Sequence[Row], *, test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    shown = Shown()
    for each in rows:
        shown.add(each)
    held_out = shown.held_out(test_share=test_share, seed=seed).tolist()
    sides: tuple[list[Row], list[Row]] = ([], [])
    for each, held in zip(rows, held_out, strict=True):
        sides[held].append(each)
    return sides


@given(st.integers(2, 300), SHARES, st.integers(0, 9))
def test_the_share_asked_for_is_the_share_given(count: int, share: float, seed: int) -> None:
    rows = [row(i, (i,)) for i in range(count)]
    train, test = split_rows(rows, test_share=share, seed=seed)
    assert len(test) == min(count - 1, max(1, round(share * count)))
    assert sorted(r.number for r in train + test) == list(range(count))


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=2, max_size=60),
    SHARES,
    st.integers(0, 9),
)
def test_no_picture_is_on_both_sides(
    pictures: list[tuple[int, ...]], share: float, seed: int
) -> None:
    rows = [row(i, shown) for i, shown in enumerate(pictures)]
    train, test = split_rows(rows, test_share=share, seed=seed)
    seen = [{name for r in side for name in r.pixels} for side in (train, test)]
    assert not seen[0] & seen[1]
    assert sorted(r.number for r in train + test) == list(range(len(rows)))
    assert train
    backwards = split_rows(rows[::-1], test_share=share, seed=seed)
    assert {r.number for r in backwards[1]} == {r.number for r in test}


def test_forty_questions_about_four_pictures_are_parted_by_picture() -> None:
    rows = [row(i, (i % 4,)) for i in range(40)]
    train, test = split_rows(rows, test_share=0.25, seed=0)
    assert (len(train), len(test)) == (30, 10)
    assert len({r.pixels for r in test}) == 1


def test_the_nearer_of_more_and_fewer_rows_is_held_out() -> None:
    """G2, where one picture has most rows"""
    rows = [row(i, (0,)) for i in range(99)] + [row(99, (1,))]
    assert [len(side) for side in split_rows(rows, test_share=0.9, seed=0)] == [1, 99]
    assert [len(side) for side in split_rows(rows, test_share=0.1, seed=0)] == [99, 1]
