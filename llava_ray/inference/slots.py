"""Which sequences of an engine's KV cache are taken, and how many tokens each has."""

from collections.abc import Sequence

from llava_ray.errors import DataError, ResourceError


class Slots:
    """`count` sequences of at most `context` tokens each."""

    def __init__(self, count: int, context: int) -> None:
        self._context = context
        self._lengths: list[int | None] = [None] * count

    def take(self) -> int:
        """Return a free slot, which then has 0 tokens.

        Raises ResourceError where none is free.
        """
        if None not in self._lengths:
            raise ResourceError(
                f"all {len(self._lengths)} slots are taken: release one or open the engine with "
                "more"
            )
        slot = self._lengths.index(None)
        self._lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Free a slot; releasing a free one does nothing."""
        self._lengths[slot] = None

    def set_length(self, slot: int, length: int) -> None:
        """Note how many tokens a taken slot has."""
        self._lengths[slot] = length

    def append(self, slots: Sequence[int]) -> list[int]:
        """Count one more token in each slot; return how many tokens each had.

        Raises DataError where a slot is given twice, is free or is full.
        """
        if len(set(slots)) != len(slots):
            raise DataError(f"slots {list(slots)}: each can take one token at a time")
        lengths = [self._length(slot) for slot in slots]
        for slot, length in zip(slots, lengths, strict=True):
            self._lengths[slot] = length + 1
        return lengths

    def _length(self, slot: int) -> int:
        length = self._lengths[slot]
        if length is None:
            raise DataError(f"slot {slot} is empty: prefill a prompt first")
        if length >= self._context:
            raise DataError(
                f"slot {slot} is full: {length} tokens; ask for fewer new tokens or open the "
                "engine with a larger context"
            )
        return length
