"""What every engine can do: prefill a prompt into a slot, decode slots together, score.

Generation, sampling and batching are written once above this interface, so what the benchmark
measures is what the endpoint serves.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_ray.models.family import Family
from llava_ray.models.images import ImagePixels

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids and images, ready for the model."""

    input_ids: tuple[int, ...]
    """Each image is a run of its `num_tokens` image tokens."""
    images: tuple[ImagePixels, ...] = ()
    """From `Family.pixels`."""


class Engine(ABC):
    """A loaded variant. Not thread-safe: one thread owns it."""

    tokenizer: Any
    """The Hugging Face tokenizer of the variant's folder."""
    family: Family
    """How the model sees pictures."""
    eos_token_id: int
    vocab_size: int
    device: str
    slots: int
    """Sequences that the KV cache has room for."""
    context: int
    """Tokens that one sequence can have, prompt and answer together."""
    packed_tokens: int = 0
    """Tokens of prompts that fill the device when they are prefilled together; 0: any alone."""

    @property
    def computes_on(self) -> str:
        """The device that the model runs on; `device` is where logits are."""
        return self.device

    @abstractmethod
    def prefill(self, prompt: Prompt) -> tuple[int, "torch.Tensor"]:
        """Run a prompt into a free slot; return the slot and the next token's logits.

        The logits are float32 [vocab_size] on the engine's device. Raises ResourceError when no
        slot is free, DataError when the prompt exceeds `context` or has fewer images than runs.
        """

    def prefill_together(self, prompts: Sequence[Prompt]) -> "list[tuple[int, torch.Tensor]]":
        """Run several prompts into free slots; default: one after the other.

        Raises as `prefill`, and then has taken no slot.
        """
        found: list[tuple[int, torch.Tensor]] = []
        try:
            for prompt in prompts:
                found.append(self.prefill(prompt))
        except BaseException:
            for slot, _ in found:
                self.release(slot)
            raise
        return found

    @abstractmethod
    def decode(self, slots: Sequence[int], tokens: "torch.Tensor") -> "torch.Tensor":
        """Append one token to each slot; return the next logits, float32 [len(slots), vocab_size].

        `tokens` is int64 [len(slots)], on the engine's device or on the CPU. Raises DataError where
        a slot is given twice, is empty or has `context` tokens already.
        """

    @abstractmethod
    def release(self, slot: int) -> None:
        """Free a slot."""

    @abstractmethod
    def score(self, prompt: Prompt, continuation: Sequence[int]) -> "torch.Tensor":
        """Teacher-force a continuation; row i of the result predicts continuation[i].

        Returns logits, float32 [len(continuation), vocab_size] on the CPU; raises as `prefill`.
        """

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of weights that one decoded token reads (language model and head)."""

    def warm_up(self) -> None:  # noqa: B027
        """Compile and record what the first request would wait for; default: nothing."""

    def keep_prefixes(self, count: int) -> None:  # noqa: B027
        """Keep the prefill of the last `count` images where the engine can; default: none."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that must be freed
        """Free what the engine holds; it cannot be used afterwards."""
