"""A split that stays where it is when rows are added."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from llava_ray.prepare.pictures import StoredRow

T = TypeVar("T")


def split_rows(
    rows: Sequence[StoredRow], *, test_share: float, seed: int
) -> tuple[list[StoredRow], list[StoredRow]]:
    """Return train and test rows by a hash of each row's id, at least one of both.

    `rows` has two or more entries.
    """
    places = [_place(stored.row.id, seed) for stored in rows]
    in_test = {i for i, place in enumerate(places) if place < test_share}
    if not in_test:
        in_test.add(places.index(min(places)))
    if len(in_test) == len(rows):
        in_test.remove(places.index(max(places)))
    train = [row for i, row in enumerate(rows) if i not in in_test]
    return train, [rows[i] for i in sorted(in_test)]


def _place(row_id: str, seed: int) -> float:
    """Map an id to [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
