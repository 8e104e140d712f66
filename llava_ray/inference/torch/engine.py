"""A PyTorch variant as an engine: own forward pass over a static cache, CUDA graphs on a GPU.

The vision tower and the projector run through the model's own modules.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.prefix_cache import (
    MOST_PREFIX_BYTES,
    PrefixCache,
    PrefixKey,
    prefix_key,
)
from llava_ray.inference.prompts import check_prompt, eos_token_id
from llava_ray.inference.slots import Slots
from llava_ray.inference.torch.cache import Segment, SlotCache
from llava_ray.inference.torch.kernels.weights import make_dense
from llava_ray.inference.torch.llama import LlamaForward, linear_groups, module_layers, windows_of
from llava_ray.models.family import family_from, mean_and_std
from llava_ray.models.images import ImagePixels

if TYPE_CHECKING:
    from llava_ray.inference.torch.decode import Decoder
    from llava_ray.inference.torch.prefill import PrefillGraphs

logger = logging.getLogger(__name__)

PACKED_TOKENS = 4800
"""Tokens of prompts that a GPU runs together: eight of LLaVA-1.5 with a picture each."""
WARM_TEXT_TOKENS = (32, 96, 160)
"""Lengths of text beside one image whose prefill is recorded ahead of the first request."""


class TorchEngine(Engine):
    """Run a LLaVA of transformers whose linears may be quantized.

    The engine owns the model from then on: it merges weights that are read together, and unpacks
    them on a CPU.
    """

    def __init__(
        self, model: torch.nn.Module, *, folder: Path, device: str, slots: int, context: int
    ) -> None:
        from transformers import AutoTokenizer

        self.device, self.slots, self.context = device, slots, context
        self.packed_tokens = PACKED_TOKENS if device.startswith("cuda") else 0
        whole: Any = model.eval()
        self._model, self._vision = whole, whole.model.vision_tower
        config = whole.config
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.family = family_from(config.to_dict(), *mean_and_std(folder))
        self.vocab_size = config.text_config.vocab_size
        self.eos_token_id = eos_token_id(
            self.tokenizer, whole.generation_config.eos_token_id, config.text_config.eos_token_id
        )
        if device == "cpu":
            make_dense(whole, whole.model.language_model.embed_tokens.weight.dtype)
        language_model = whole.model.language_model
        self._embed: Any = language_model.embed_tokens
        self._slots = Slots(slots, context)
        self._cache = SlotCache(
            config.text_config,
            slots=slots + (1 if device.startswith("cuda") else 0),
            context=context,
            dtype=self._embed.weight.dtype,
            device=device,
        )
        self._weight_bytes = _read_per_token(language_model, whole.lm_head)
        self._decoder: Decoder | None = None
        self._graphs: PrefillGraphs | None = None
        with torch.no_grad():
            self._open_forward(language_model, whole.lm_head)
        self.prefixes: PrefixCache[list[torch.Tensor]] = PrefixCache()

    def _open_forward(self, language_model: Any, lm_head: Any) -> None:
        """Use the GPU kernels where they can be had, else the model's own modules."""
        stack = None
        if self.device.startswith("cuda") and any(windows_of(language_model.config)):
            logger.warning("slow path: no fast kernel for attention to a window of tokens")
        elif self.device.startswith("cuda"):
            if importlib.util.find_spec("triton") is None:
                logger.warning("slow path: no fast kernels without Triton: pip install triton")
            else:
                from llava_ray.inference.torch.decode import Decoder, read_stack

                stack = read_stack(language_model, lm_head)
        if stack is None:
            own = module_layers(language_model)
            self._forward = LlamaForward(language_model, own, lm_head, self._cache)
            return
        self._weight_bytes = stack.bytes()
        layers = [layer.mapped(stack.projection) for layer in stack.layers]
        head = stack.projection(stack.head)
        self._forward = LlamaForward(language_model, layers, head, self._cache, alternating=True)
        self._decoder = Decoder(stack, self._cache, self._forward.cos, self._forward.sin)
        from llava_ray.inference.torch.prefill import PrefillGraphs

        self._graphs = PrefillGraphs(self._forward, self._cache, self._encode)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and record decoding and prefill ahead of the first request."""
        if self._decoder is not None:
            self._decoder.warm_up()
        if self._graphs is not None:
            image = self.family.vision.tokens
            lengths = [image + text for text in WARM_TEXT_TOKENS if image + text <= self.context]
            self._graphs.warm_up(lengths, self._embed.weight.dtype)
            size = self.family.vision.image_size
            blank = self.family.pixels(Image.new("RGB", (size, size)))
            self._image_features([blank])

    def kernel_name(self, batch: int) -> str:
        """Say what multiplies the decoder's matrices at a batch size."""
        if self._decoder is None:
            return "the model's own modules"
        return self._decoder.kernel_name(batch)

    def keep_prefixes(self, count: int) -> None:
        """Keep the keys and values of the last `count` image prefixes, to skip their prefill.

        Fewer where they would take more than 2 GiB, or half of what a GPU has free. Off at first,
        so that timings of prefill mean what they say.
        """
        room = MOST_PREFIX_BYTES
        if self.device.startswith("cuda"):
            room = min(room, torch.cuda.mem_get_info(self.device)[0] // 2)
        self.prefixes = PrefixCache(count, room)
        if count and self._graphs is not None:
            self._warm_prefixes()

    def _warm_prefixes(self) -> None:
        """Ask twice about one image, for kernels that only a known image's prompt runs."""
        image = self.family.pixels(Image.new("RGB", (1, 1)))
        ids = (0, *[self.family.vision.image_token_id] * image.num_tokens, 0, 0)
        if len(ids) <= self.context:
            for _ in range(2):
                slot, _ = self.prefill(Prompt(ids, (image,)))
                self.release(slot)
        self.prefixes.clear()

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        """Run a prompt into a free slot; return the slot and the next token's logits."""
        check_prompt(self, prompt, len(prompt.input_ids))
        slot = self._slots.take()
        try:
            return slot, self._run(prompt, slot, prompt.input_ids, rows=1)[0]
        except BaseException:
            self._slots.release(slot)
            raise

    @torch.no_grad()
    def prefill_together(self, prompts: Sequence[Prompt]) -> list[tuple[int, torch.Tensor]]:
        """Run several prompts as one pass, but those whose pictures are known by themselves."""
        keys = [self._key(prompt, prompt.input_ids) for prompt in prompts]
        known = [key is not None and key in self.prefixes for key in keys]
        if known.count(False) < 2:
            return super().prefill_together(prompts)
        for prompt in prompts:
            check_prompt(self, prompt, len(prompt.input_ids))
        slots: list[int] = []
        try:
            for _ in prompts:
                slots.append(self._slots.take())
            asked = list(zip(prompts, slots, keys, known, strict=True))
            new = [(prompt, slot, key) for prompt, slot, key, is_known in asked if not is_known]
            rows = dict(zip((slot for _, slot, _ in new), self._run_together(new), strict=True))
            for prompt, slot, _, is_known in asked:
                if is_known:
                    rows[slot] = self._run(prompt, slot, prompt.input_ids, rows=1)[0]
            return [(slot, rows[slot]) for slot in slots]
        except BaseException:
            for slot in slots:
                self._slots.release(slot)
            raise

    def _run_together(self, asked: Sequence[tuple[Prompt, int, PrefixKey | None]]) -> torch.Tensor:
        """Fill free slots with prompts; return each one's next logits."""
        ids = [token for prompt, _, _ in asked for token in prompt.input_ids]
        hidden = self._embeddings(ids, [image for prompt, _, _ in asked for image in prompt.images])
        parts = [Segment(slot, 0, len(prompt.input_ids)) for prompt, slot, _ in asked]
        hidden = self._forward(hidden, parts)
        for part, (_, slot, key) in zip(parts, asked, strict=True):
            self._filled(slot, part.count, key)
        last = torch.tensor([part.count for part in parts], device=self.device).cumsum(0) - 1
        return self._forward.logits(hidden[last])

    @torch.no_grad()
    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each slot; return the next logits, float32 [len(slots), vocab]."""
        lengths = self._slots.append(slots)
        if self._decoder is not None:
            return self._decoder.step(slots, tokens)
        parts = [Segment(slot, length, 1) for slot, length in zip(slots, lengths, strict=True)]
        hidden = self._forward(self._embed(tokens.to(self.device)), parts)
        return self._forward.logits(hidden)

    def release(self, slot: int) -> None:
        """Free a slot."""
        self._slots.release(slot)

    @torch.no_grad()
    def score(self, prompt: Prompt, continuation: Sequence[int]) -> torch.Tensor:
        """Teacher-force a continuation; row i of the result predicts continuation[i]."""
        ids = (*prompt.input_ids, *continuation[:-1])
        check_prompt(self, prompt, len(ids))
        if not continuation:
            return torch.empty(0, self.vocab_size)
        slot = self._slots.take()
        try:
            return self._run(prompt, slot, ids, rows=len(continuation)).cpu()
        finally:
            self._slots.release(slot)

    def weight_bytes(self) -> int:
        """Return the bytes of weights that one decoded token reads (language model and head)."""
        return self._weight_bytes

    def close(self) -> None:
        """Free the model and the cache."""
        self.prefixes.clear()
        del (
            self._model,
            self._vision,
            self._forward,
            self._cache,
            self._embed,
            self._decoder,
            self._graphs,
        )
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _run(self, prompt: Prompt, slot: int, ids: Sequence[int], *, rows: int) -> torch.Tensor:
        """Fill a free slot with ids; return the last rows' logits."""
        key = self._key(prompt, ids, rows)
        kept = None if key is None else self.prefixes.get(key)
        start = 0 if key is None or kept is None else len(key.ids)
        for cached, values in zip(self._prefix(slot, start), kept or (), strict=False):
            cached.copy_(values)
        hidden = self._embeddings(ids[start:], () if start else prompt.images)
        if self._graphs is not None and not start:
            hidden = self._graphs.prefill(hidden, slot)
        else:
            hidden = self._forward(hidden, [Segment(slot, start, len(ids) - start)])
        self._filled(slot, len(ids), None if start else key)
        return self._forward.logits(hidden[-rows:])

    def _key(self, prompt: Prompt, ids: Sequence[int], rows: int = 1) -> PrefixKey | None:
        """Return what a prompt's prefix is known by, where prefixes are kept."""
        if not self.prefixes.capacity:
            return None
        return prefix_key(prompt, ids, self.family.vision.image_token_id, rows)

    def _prefix(self, slot: int, end: int) -> list[torch.Tensor]:
        return [part[:, slot, :, :end] for part in (self._cache.keys, self._cache.values)]

    def _filled(self, slot: int, length: int, key: PrefixKey | None) -> None:
        """Note how many tokens a slot holds, and keep its prefix under a key."""
        self._slots.set_length(slot, length)
        if self._decoder is not None:
            self._decoder.set_length(slot, length)
        if key is not None:
            prefix = self._prefix(slot, len(key.ids))
            size = sum(part.nbytes for part in prefix)
            self.prefixes.put(key, size, lambda: [part.clone() for part in prefix])

    def _embeddings(self, ids: Sequence[int], images: Sequence[ImagePixels]) -> torch.Tensor:
        """Return [len(ids), hidden], with the images where their tokens stand."""
        tokens = torch.tensor(ids, device=self.device)
        is_image = tokens == self.family.vision.image_token_id
        hidden: torch.Tensor = self._embed(tokens.masked_fill(is_image, 0))
        if images:
            features = self._image_features(images).to(hidden.dtype)
            hidden = hidden.masked_scatter(is_image[:, None], features)
        return hidden

    def _image_features(self, images: Sequence[ImagePixels]) -> torch.Tensor:
        """Return [image tokens, hidden] from the vision tower and projector."""
        shown = self.family.inputs(images, self.device)
        pixels = shown.pop("pixel_values").to(self._vision.dtype)
        if self._graphs is not None and not shown and len(images) == 1:
            return self._graphs.encode(pixels)
        return self._encode(pixels, **shown)

    def _encode(self, pixels: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """Turn [tiles, 3, size, size] into the language model's inputs."""
        output = self._model.model.get_image_features(pixel_values=pixels, return_dict=True, **more)
        return torch.cat(list(output.pooler_output))


def _read_per_token(language_model: Any, lm_head: torch.nn.Module) -> int:
    """Sum the bytes of all linears, norms and the head, packed as they are."""
    modules = [lm_head]
    for layer in language_model.layers:
        modules += [module for group in linear_groups(layer).values() for module in group]
        modules += [layer.input_layernorm, layer.post_attention_layernorm]
    return sum(_tensor_bytes(module) for module in [*modules, language_model.norm])


def _tensor_bytes(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    states = [getattr(parameter, "quant_state", None) for parameter in module.parameters()]
    tensors += [state.absmax for state in states if state is not None]  # bitsandbytes 4-bit
    meta = getattr(module, "meta", None)
    if isinstance(meta, dict):  # HQQ keeps scales and zero points beside its parameters
        tensors += [value for value in meta.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
