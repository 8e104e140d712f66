"""Which rows are held out: of the share that is asked for, and no picture on both sides."""

import hashlib
import logging
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_ray.prepare.rows import Row

logger = logging.getLogger(__name__)


class Shown:
    """What tells rows apart: their pictures' content, or their text where there is none."""

    def __init__(self) -> None:
        self._digests, self._counts = bytearray(), array("i")

    def add(self, row: Row) -> None:
        """Take a row whose pictures were read."""
        found = row.pixels or (hashlib.sha256(repr(row.sample.turns).encode()).hexdigest()[:32],)
        for digest in found:
            self._digests += bytes.fromhex(digest)
        self._counts.append(len(found))

    def held_out(self, *, test_share: float, seed: int) -> NDArray[np.bool_]:
        """Say of each row whether it is held out; there are two or more.

        Rows with a picture in common go together, in the order of a hash of what they show, so most
        stay where they are when others are added.
        """
        words = np.frombuffer(self._digests, ">u8").reshape(-1, 2)
        pictures, numbers = np.unique(words, axis=0, return_inverse=True)
        group_of_row = self._groups(numbers.reshape(-1), len(pictures))
        groups, rows, sizes = np.unique(group_of_row, return_inverse=True, return_counts=True)
        if len(groups) == 1:
            logger.warning("prepare: all rows show the same picture, so none are held out")
            return np.zeros(len(self._counts), np.bool_)
        names = (pictures[group].tobytes().hex() for group in groups)
        hashes = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names]
        order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
        wanted = min(len(rows) - 1, max(1, round(test_share * len(rows))))
        chosen, taken = np.zeros(len(groups), np.bool_), 0
        for group, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if taken + size <= wanted:
                chosen[group], taken = True, taken + size
        # Where one picture has most rows, it alone may come nearer to what is asked for.
        alone = order[np.argmin(np.abs(sizes[order] - wanted))]
        if not taken or abs(int(sizes[alone]) - wanted) < wanted - taken:
            chosen[:], chosen[alone], taken = False, True, int(sizes[alone])
        if abs(taken - wanted) > max(1, 0.1 * wanted):
            logger.warning(
                "prepare: %d of %d rows are held out, data.test_share=%g asks for %d: rows that "
                "show the same picture stay together",
                taken, len(rows), test_share, wanted,
            )  # fmt: skip
        held_out: NDArray[np.bool_] = chosen[rows]
        return held_out

    def _groups(self, pictures: NDArray[Any], count: int) -> NDArray[Any]:
        """Return for each row the first picture of all that hang together with its own."""
        parent = np.arange(count)
        ends = np.cumsum(np.array(self._counts))
        firsts = ends - np.array(self._counts)

        def root(picture: int) -> int:
            while (above := int(parent[picture])) != picture:
                parent[picture] = parent[above]
                picture = above
            return picture

        for row in np.flatnonzero(ends - firsts > 1).tolist():
            first, *others = pictures[firsts[row] : ends[row]].tolist()
            for other in others:
                low, high = sorted((root(first), root(other)))
                parent[high] = low
        while (parent != parent[parent]).any():
            parent = parent[parent]
        found: NDArray[Any] = parent[pictures[firsts]]
        return found
