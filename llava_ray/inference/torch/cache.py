"""Keys and values of every slot in one preallocated tensor, and the prefixes kept for reuse."""

from collections import OrderedDict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one forward pass: `count` tokens of a slot, from position `start` on."""

    slot: int
    start: int
    count: int


class SlotCache:
    """Static cache: `keys` and `values` are [layers, slots, kv_heads, context, head_dim].

    Static, since CUDA graphs read and write fixed addresses.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        context: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        spare: int = 0,
    ) -> None:
        """Allocate; `spare` slots beyond `slots` are never given out."""
        shape = (layers, slots + spare, kv_heads, context, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots
        self._free = list(range(slots - 1, -1, -1))

    def take(self) -> int | None:
        """Return a free slot with length 0, or None."""
        if not self._free:
            return None
        slot = self._free.pop()
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; releasing a free slot does nothing."""
        if slot not in self._free:
            self._free.append(slot)

    def held(self, slot: int) -> bool:
        """Return whether a slot is taken."""
        return 0 <= slot < len(self.lengths) and slot not in self._free

    def write(self, layer: int, part: Segment, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows [count, kv_heads, head_dim] to their slot."""
        end = part.start + part.count
        self.keys[layer, part.slot, :, part.start : end] = keys.transpose(0, 1)
        self.values[layer, part.slot, :, part.start : end] = values.transpose(0, 1)

    def read(self, layer: int, slot: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views [1, kv_heads, end, head_dim] of a slot's first rows."""
        return (
            self.keys[layer, slot : slot + 1, :, :end],
            self.values[layer, slot : slot + 1, :, :end],
        )


@dataclass(frozen=True)
class PrefixKey:
    """What a prefix is known by: its ids and the SHA-256 of its images' pixels."""

    ids: tuple[int, ...]
    images: tuple[str, ...]


MOST_PREFIX_BYTES = 2**31
"""All kept prefixes together: one image of LLaVA-1.5-7B takes some 300 MB of a 16-bit cache."""


class PrefixStore:
    """The least recently used prefixes fall out; `capacity` 0 keeps none."""

    def __init__(self, capacity: int, max_bytes: int = MOST_PREFIX_BYTES) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._rows: OrderedDict[PrefixKey, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def load(self, key: PrefixKey, cache: SlotCache, slot: int) -> bool:
        """Copy a known prefix into a slot and set its length; return whether it was known."""
        rows = self._rows.get(key)
        if rows is None:
            return False
        self._rows.move_to_end(key)
        end = len(key.ids)
        cache.keys[:, slot, :, :end] = rows[0]
        cache.values[:, slot, :, :end] = rows[1]
        cache.lengths[slot] = end
        return True

    def save(self, key: PrefixKey, cache: SlotCache, slot: int) -> None:
        """Keep a copy of a slot's first rows, unless it alone is too large."""
        end = len(key.ids)
        rows = cache.keys[:, slot, :, :end], cache.values[:, slot, :, :end]
        if self.capacity <= 0 or _bytes(rows) > self.max_bytes:
            return
        self._rows.pop(key, None)
        # Before the copy is made: on a GPU there may be no room for one more.
        while len(self._rows) >= self.capacity or self._held() + _bytes(rows) > self.max_bytes:
            self._rows.popitem(last=False)
        self._rows[key] = (rows[0].clone(), rows[1].clone())

    def clear(self) -> None:
        """Drop all prefixes."""
        self._rows.clear()

    def _held(self) -> int:
        return sum(map(_bytes, self._rows.values()))


def _bytes(rows: tuple[torch.Tensor, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in rows)
