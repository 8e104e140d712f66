"""Keys and values of every slot in one preallocated tensor."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one forward pass: `count` tokens of a slot, from position `start` on."""

    slot: int
    start: int
    count: int


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


class SlotCache:
    """Static cache: `keys` and `values` are [layers, slots, kv_heads, context, head_dim].

    Static, since CUDA graphs read and write fixed addresses.
    """

    def __init__(
        self, config: Any, *, slots: int, context: int, dtype: torch.dtype, device: str
    ) -> None:
        """Allocate for a LlamaConfig; a slot that graphs and padding use counts too."""
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, heads, context, head_size(config))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

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
