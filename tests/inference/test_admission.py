"""The policy by which waiting prompts are prefilled together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_ray.inference.admission import prompts_together


@pytest.mark.parametrize(
    ("waiting", "free", "packed", "answering", "count"),
    [
        ([600] * 64, 64, 4800, False, 8),
        ([600] * 64, 64, 4800, True, 2),
        ([600] * 64, 3, 4800, False, 3),
        ([2900, 600], 9, 4800, True, 1),
        ([600] * 64, 64, 0, False, 1),
        ([600], 0, 4800, False, 0),
        ([], 9, 4800, False, 0),
    ],
)
def test_as_many_as_fill_the_device(
    waiting: list[int], free: int, packed: int, answering: bool, count: int
) -> None:
    found = prompts_together(waiting, free_slots=free, packed_tokens=packed, answering=answering)
    assert found == count


@given(st.lists(st.integers(1, 5000)), st.integers(0, 70), st.integers(0, 9999), st.booleans())
def test_nobody_waits_for_nothing_and_nobody_is_stalled(
    waiting: list[int], free: int, packed: int, answering: bool
) -> None:
    count = prompts_together(waiting, free_slots=free, packed_tokens=packed, answering=answering)
    assert min(1, len(waiting), free) <= count <= min(len(waiting), free)
    assert count <= 1 or sum(waiting[:count]) <= (packed // 4 if answering else packed)
