"""An engine whose next token hangs on the last token and the pixels, plus noise of a set size."""

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.family import VisionShape
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.llava import Llava


class NoisyEngine(Engine):
    """Stands for a variant; noise 0 is the baseline."""

    family = Llava(VisionShape(image_size=8, tokens=4, image_token_id=1022))
    eos_token_id = 2
    device = "cpu"

    def __init__(self, noise: float = 0.0, vocab_size: int = 1024) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        self.slots, self.context, self.vocab_size = 1, 512, vocab_size
        generator = torch.Generator().manual_seed(0)
        self._table = torch.randn(vocab_size, vocab_size, generator=generator)
        self._table += noise * torch.randn(vocab_size, vocab_size, generator=generator)
        self.seen: list[Prompt] = []
        self.decoded = 0

    def prefill(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        self.seen.append(prompt)
        return 0, self._logits(prompt, [prompt.input_ids[-1]])[0]

    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        self.decoded += 1
        return self._table[tokens]

    def release(self, slot: int) -> None:
        assert slot == 0

    def score(self, prompt: Prompt, continuation: Sequence[int]) -> torch.Tensor:
        self.seen.append(prompt)
        return self._logits(prompt, [prompt.input_ids[-1], *continuation[:-1]])

    def weight_bytes(self) -> int:
        return self._table.nbytes

    def _logits(self, prompt: Prompt, ids: list[int]) -> torch.Tensor:
        brightness = sum(int(image.tiles.sum()) for image in prompt.images) % 1000
        return self._table[torch.tensor(ids)] + self._table[brightness]
