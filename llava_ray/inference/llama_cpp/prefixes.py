"""Prefills of images that llama.cpp has seen, kept as the bytes of its cache."""

import ctypes
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from llava_ray.errors import VariantError
from llava_ray.inference.torch.cache import MOST_PREFIX_BYTES, PrefixKey
from llava_ray.models.images import Pixels


class LlamaPrefixes:
    """The least recently used prefixes fall out; `capacity` 0 keeps none."""

    def __init__(
        self, llama_cpp: Any, capacity: int = 0, max_bytes: int = MOST_PREFIX_BYTES
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._llama = llama_cpp
        self._states: OrderedDict[PrefixKey, Any] = OrderedDict()

    def key(
        self, ids: Sequence[int], images: Sequence[Pixels], image_token_id: int, *, rows: int
    ) -> PrefixKey | None:
        """Name a prompt up to its last image; None where nothing is kept or can be skipped.

        The last `rows` ids give the logits, so they cannot be skipped.
        """
        if not self.capacity or not images:
            return None
        end = max(i for i, token in enumerate(ids) if token == image_token_id) + 1
        if end > len(ids) - rows:
            return None
        hashes = (hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in images)
        return PrefixKey(tuple(ids[:end]), tuple(hashes))

    def load(self, key: PrefixKey, context: Any, slot: int) -> bool:
        """Put a known prefix into an empty slot; return whether it was known."""
        state = self._states.get(key)
        if state is None:
            return False
        self._states.move_to_end(key)
        if not self._llama.llama_state_seq_set_data(context, state, len(state), slot):
            raise VariantError("llama.cpp did not take back the prefill of an image")
        return True

    def save(self, key: PrefixKey, context: Any, slot: int) -> None:
        """Keep what a slot holds at this moment."""
        size = self._llama.llama_state_seq_get_size(context, slot)
        state = (ctypes.c_uint8 * size)()
        if self._llama.llama_state_seq_get_data(context, state, size, slot) != size:
            return
        self._states[key] = state
        while len(self._states) > self.capacity or self._bytes() > self.max_bytes:
            self._states.popitem(last=False)

    def _bytes(self) -> int:
        return sum(len(state) for state in self._states.values())

    def clear(self) -> None:
        """Drop all prefixes."""
        self._states.clear()
