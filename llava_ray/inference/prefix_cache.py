"""What engines keep of prompts up to their last image, to skip its prefill the next time."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from llava_ray.inference.engine import Prompt

State = TypeVar("State")

MOST_PREFIX_BYTES = 2**31
"""All kept prefixes together: one image of LLaVA-1.5-7B takes some 300 MB of a 16-bit cache."""


class PrefixKey(NamedTuple):
    """What a prefix is known by: its ids and the SHA-256 of its images' pixels."""

    ids: tuple[int, ...]
    images: tuple[str, ...]


def prefix_key(
    prompt: Prompt, ids: Sequence[int], image_token_id: int, rows: int
) -> PrefixKey | None:
    """Name ids up to the last image; None where there is none or nothing can be skipped.

    The last `rows` ids give the logits, so they cannot be skipped.
    """
    if not prompt.images:
        return None
    end = len(ids) - ids[::-1].index(image_token_id)
    if end > len(ids) - rows:
        return None
    hashes = (hashlib.sha256(image.tiles.tobytes()).hexdigest() for image in prompt.images)
    return PrefixKey(tuple(ids[:end]), tuple(hashes))


class PrefixCache(Generic[State]):
    """The least recently used prefixes fall out; `capacity` 0 keeps none."""

    def __init__(self, capacity: int = 0, max_bytes: int = MOST_PREFIX_BYTES) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._states: OrderedDict[PrefixKey, tuple[State, int]] = OrderedDict()

    def get(self, key: PrefixKey) -> State | None:
        """Return what was kept for a key, or None."""
        if key not in self._states:
            return None
        self._states.move_to_end(key)
        return self._states[key][0]

    def put(self, key: PrefixKey, num_bytes: int, copy: Callable[[], State]) -> None:
        """Keep `copy()` of that many bytes, unless it alone is too large."""
        if self.capacity <= 0 or num_bytes > self.max_bytes:
            return
        self._states.pop(key, None)
        # Before the copy is made: on a GPU there may be no room for one more.
        while len(self._states) >= self.capacity or self._bytes() + num_bytes > self.max_bytes:
            self._states.popitem(last=False)
        self._states[key] = copy(), num_bytes

    def clear(self) -> None:
        """Drop all prefixes."""
        self._states.clear()

    def __iter__(self) -> Iterator[PrefixKey]:
        return iter(self._states)

    def _bytes(self) -> int:
        return sum(size for _, size in self._states.values())
