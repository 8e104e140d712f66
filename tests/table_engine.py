"""An engine whose next token hangs on the last tokens alone, by a fixed random table."""

from collections.abc import Sequence
from typing import Any

import torch

from llava_ray.errors import DataError, ResourceError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.family import VisionShape
from llava_ray.models.llava import Llava


class Letters:
    """A byte tokenizer with Llama's special tokens; id 3 + byte, then `<image>`."""

    image = 259
    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [1]
        for index, part in enumerate(text.split("<image>")):
            ids += ([self.image] if index else []) + [3 + byte for byte in part.encode()]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<0x{token_id - 3:02X}>"


class TableEngine(Engine):
    """Deterministic, quick, and strict about how it is used."""

    vocab_size = 260
    eos_token_id = 2
    family = Llava(VisionShape(image_size=8, tokens=4, image_token_id=Letters.image))
    device = "cpu"

    def __init__(self, slots: int = 4, context: int = 256, letters: str = "abcdefgh ") -> None:
        self.tokenizer = Letters()
        self.slots, self.context = slots, context
        generator = torch.Generator().manual_seed(0)
        self._table = torch.full((self.vocab_size, self.vocab_size), -30.0)
        columns = [3 + byte for byte in letters.encode()]
        self._table[:, columns] = torch.randn(self.vocab_size, len(columns), generator=generator)
        self.held: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.prefills = 0

    def prefill(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        if len(prompt.input_ids) > self.context:
            raise DataError(f"{len(prompt.input_ids)} tokens: the context holds {self.context}")
        free = [slot for slot in range(self.slots) if slot not in self.held]
        if not free:
            raise ResourceError("no slot is free")
        self.prefills += 1
        # The pixels count, so an answer tells whether they came through.
        shade = sum(int(image.tiles.sum()) for image in prompt.images) % 7
        logits = self._table[prompt.input_ids[-1]].roll(0) + self._table[3 + shade]
        self.held[free[0]] = list(prompt.input_ids)
        return free[0], logits

    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        assert len(set(slots)) == len(slots) == len(tokens)
        self.batches.append(len(slots))
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self.held[slot].append(token)
            assert len(self.held[slot]) <= self.context
        return self._table[tokens]

    def release(self, slot: int) -> None:
        del self.held[slot]

    def score(self, prompt: Prompt, continuation: Sequence[int]) -> torch.Tensor:
        return self._table[torch.tensor([prompt.input_ids[-1], *continuation[:-1]])]

    def weight_bytes(self) -> int:
        return self._table.nbytes
