"""A GGUF pair as an engine, on llama.cpp's own functions rather than its Python wrapper.

Token ids come from the Hugging Face tokenizer in the variant's folder. Logits are on the CPU,
where llama.cpp leaves them, also when the layers run on a GPU.
"""

import ctypes
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava_ray.errors import ArtifactError, ResourceError, VariantError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.llama_cpp import MAX_SEQUENCES
from llava_ray.inference.llama_cpp.native import Batch, last_error, load_llama_cpp, open_model
from llava_ray.inference.llama_cpp.trial import extra_buffers
from llava_ray.inference.llama_cpp.vision import ImageEncoder
from llava_ray.inference.prefix_cache import PrefixCache, PrefixKey, prefix_key
from llava_ray.inference.prompts import check_prompt, eos_token_id
from llava_ray.inference.slots import Slots
from llava_ray.models.family import family_of
from llava_ray.models.images import Pixels

logger = logging.getLogger(__name__)

_LARGEST_BATCH = 2048
_MICRO_BATCH = 512
_F32_FILE = 0
"""LLAMA_FTYPE_ALL_F32"""
_GGML_F32, _GGML_F16 = 0, 1


class LlamaCppEngine(Engine):
    """Run a text GGUF and an mmproj GGUF; each slot is a sequence of llama.cpp's cache."""

    device = "cpu"

    def __init__(self, folder: Path, *, device: str, slots: int, context: int) -> None:
        from transformers import AutoTokenizer

        if not 0 < slots <= MAX_SEQUENCES:
            raise ResourceError(f"{slots} slots: llama.cpp takes 1 to {MAX_SEQUENCES}")
        self._llama: Any = load_llama_cpp()
        self._model: Any = None
        self._context: Any = None
        self._images: ImageEncoder | None = None
        self.slots, self.context = slots, context
        self._slots = Slots(slots, context)
        self._prefixes: PrefixCache[Any] = PrefixCache()
        self._text_file, mmproj = find_pair(folder)
        self.offloaded = device.startswith("cuda") and self._gpu_offload()
        self.family = family_of(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_token_id = eos_token_id(self.tokenizer, _configured_eos(folder))
        try:
            self._open(mmproj)
        except BaseException:
            self.close()
            raise

    def keep_prefixes(self, count: int) -> None:
        """Keep llama.cpp's cache of the last `count` image prefixes, to skip their prefill."""
        self._prefixes = PrefixCache(count)

    def prefill(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        """Run a prompt into a free slot; return the slot and the next token's logits."""
        check_prompt(self, prompt, len(prompt.input_ids))
        slot = self._slots.take()
        try:
            return slot, self._run(prompt, slot, prompt.input_ids, rows=1)[0]
        except BaseException:
            self.release(slot)
            raise

    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each slot; return the next logits, float32 [len(slots), vocab]."""
        count = len(slots)
        if count == 0:
            return torch.empty(0, self.vocab_size)
        lengths = self._slots.append(slots)
        # Ascending slots go through the layers together; others one after the other.
        order = np.argsort(np.asarray(slots))
        batch = self._batch
        batch.slots[:count] = np.asarray(slots)[order]
        batch.positions[:count] = np.asarray(lengths)[order]
        batch.tokens[:count] = tokens.cpu().numpy()[order]
        batch.wanted[:count] = 1
        self._decode(batch.of_tokens(count))
        logits = np.empty((count, self.vocab_size), dtype=np.float32)
        logits[order] = self._logits(count)
        return torch.from_numpy(logits)

    def release(self, slot: int) -> None:
        """Free a slot."""
        self._slots.release(slot)
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_seq_rm(memory, slot, -1, -1)

    def score(self, prompt: Prompt, continuation: Sequence[int]) -> torch.Tensor:
        """Teacher-force a continuation; row i of the result predicts continuation[i]."""
        ids = (*prompt.input_ids, *continuation[:-1])
        check_prompt(self, prompt, len(ids))
        if not continuation:
            return torch.empty(0, self.vocab_size)
        slot = self._slots.take()
        try:
            return self._run(prompt, slot, ids, rows=len(continuation))
        finally:
            self.release(slot)

    def weight_bytes(self) -> int:
        """Return the bytes of weights that one decoded token reads (language model and head)."""
        from gguf import GGUFReader

        sizes = {str(t.name): int(t.n_bytes) for t in GGUFReader(self._text_file).tensors}
        # Of the embedding one row is read, unless it is the head too.
        embedding = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        return sum(sizes.values()) - embedding

    def close(self) -> None:
        """Free the model, its cache and the image encoder."""
        self._prefixes.clear()
        if self._images is not None:
            self._images.close()
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._images = self._context = self._model = None

    def embed_image(self, pixels: Pixels) -> NDArray[np.float32]:
        """Return what the language model sees of an image: [image tokens, hidden]."""
        assert self._images is not None
        embeddings = self._images.encode(pixels)
        expected = self.family.vision.tokens
        if len(embeddings) != expected:
            raise VariantError(
                f"llama.cpp made {len(embeddings)} tokens of an image, not {expected}: the mmproj "
                "does not fit config.json"
            )
        return embeddings

    def _gpu_offload(self) -> bool:
        if self._llama.llama_supports_gpu_offload():
            return True
        logger.warning(
            "this llama-cpp-python was built without GPU support, so GGUF runs on the CPU; "
            "install it with CMAKE_ARGS='-DGGML_CUDA=on'"
        )
        return False

    @property
    def computes_on(self) -> str:
        """A GPU only where llama.cpp was built for one, whatever was asked for."""
        return "cuda" if self.offloaded else "cpu"

    def _open(self, mmproj: Path) -> None:
        llama = self._llama
        llama.llama_backend_init()
        self._model = open_model(
            self._text_file,
            n_gpu_layers=-1 if self.offloaded else 0,
            use_extra_bufts=extra_buffers(),
        )
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        # The threads that PyTorch variants get too: Ray sets them by the task's num_cpus.
        threads = torch.get_num_threads()
        exact = llama.llama_model_ftype(self._model) == _F32_FILE
        self._context = llama.llama_init_from_model(self._model, self._parameters(threads, exact))
        if not self._context:
            raise ResourceError(
                f"llama.cpp has no memory for {self.slots} slots of {self.context} tokens: "
                f"{last_error()}"
            )
        self._batch = Batch(llama, llama.llama_n_batch(self._context))
        self._images = ImageEncoder(
            mmproj,
            self._model,
            hidden=llama.llama_model_n_embd(self._model),
            threads=threads,
            gpu=self.offloaded,
            exact=exact,
        )

    def _parameters(self, threads: int, exact: bool) -> Any:
        params = self._llama.llama_context_default_params()
        # llama.cpp divides n_ctx by the slots and wants multiples of 256.
        params.n_ctx = self.slots * (-(-self.context // 256) * 256)
        params.n_batch = max(min(self.context, _LARGEST_BATCH), self.slots)
        params.n_ubatch = min(params.n_batch, _MICRO_BATCH)
        params.n_seq_max = self.slots
        # Scoring wants many rows of one sequence; the default reserves room for one.
        params.n_outputs_max_per_seq = 0
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        # A file in full precision is there to be compared with, so its cache is full too.
        params.type_k = params.type_v = _GGML_F32 if exact else _GGML_F16
        if exact:
            params.flash_attn_type = 0
        return params

    def _run(self, prompt: Prompt, slot: int, ids: Sequence[int], *, rows: int) -> torch.Tensor:
        """Fill an empty slot; return the logits of the last `rows` positions."""
        collected: list[NDArray[np.float32]] = []
        first_wanted = len(ids) - rows
        remaining = iter(prompt.images)
        key = None
        if self._prefixes.capacity:
            key = prefix_key(prompt, ids, self.family.vision.image_token_id, rows)
        begin = len(key.ids) if key is not None and self._load_prefix(key, slot) else 0
        for start, end, is_image in self._segments(ids):
            if end <= begin:
                continue
            embeddings = self.embed_image(next(remaining).tiles[0]) if is_image else None
            for low in range(start, end, self._batch.capacity):
                high = min(low + self._batch.capacity, end)
                count = self._fill(slot, low, high, first_wanted)
                if embeddings is None:
                    self._batch.tokens[: high - low] = ids[low:high]
                    self._decode(self._batch.of_tokens(high - low))
                else:
                    part = embeddings[low - start : high - start]
                    self._decode(self._batch.of_embeddings(part))
                if count:
                    collected.append(self._logits(count).copy())
            if key is not None and not begin and end == len(key.ids):
                self._save_prefix(key, slot)
        self._slots.set_length(slot, len(ids))
        return torch.from_numpy(np.concatenate(collected))

    def _segments(self, ids: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is_image) of text between images and of each image."""
        start, vision = 0, self.family.vision
        while start < len(ids):
            if ids[start] == vision.image_token_id:
                yield start, start + vision.tokens, True
                start += vision.tokens
                continue
            end = start
            while end < len(ids) and ids[end] != vision.image_token_id:
                end += 1
            yield start, end, False
            start = end

    def _fill(self, slot: int, low: int, high: int, first_wanted: int) -> int:
        """Set positions and slot of a batch; return how many logits it will give."""
        count = high - low
        positions = np.arange(low, high, dtype=np.int32)
        self._batch.positions[:count] = positions
        self._batch.slots[:count] = slot
        self._batch.wanted[:count] = positions >= first_wanted
        return int(self._batch.wanted[:count].sum())

    def _decode(self, batch: Any) -> None:
        code = self._llama.llama_decode(self._context, batch)
        if code != 0:
            raise VariantError(f"llama_decode failed with {code}: {last_error()}")

    def _logits(self, count: int) -> NDArray[np.float32]:
        """Return llama.cpp's own buffer [count, vocab], valid until the next decode."""
        address = ctypes.cast(
            self._llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float)
        )
        return np.ctypeslib.as_array(address, shape=(count, self.vocab_size))

    def _load_prefix(self, key: PrefixKey, slot: int) -> bool:
        """Put a known prefix into an empty slot; return whether it was known."""
        state = self._prefixes.get(key)
        if state is None:
            return False
        if not self._llama.llama_state_seq_set_data(self._context, state, len(state), slot):
            raise VariantError("llama.cpp did not take back the prefill of an image")
        return True

    def _save_prefix(self, key: PrefixKey, slot: int) -> None:
        """Keep what a slot has at this moment, as the bytes of llama.cpp's cache."""
        size = self._llama.llama_state_seq_get_size(self._context, slot)

        def copy() -> Any:
            state = (ctypes.c_uint8 * size)()
            copied = self._llama.llama_state_seq_get_data(self._context, state, size, slot)
            if copied != size:
                raise VariantError(f"llama.cpp gave {copied} of {size} bytes of its cache")
            return state

        self._prefixes.put(key, size, copy)


def find_pair(folder: Path) -> tuple[Path, Path]:
    """Return the text file and the mmproj file of a variant's folder.

    Raises ArtifactError when there is not exactly one of each.
    """
    files = sorted(folder.glob("*.gguf"))
    mmprojs = [path for path in files if path.name.startswith("mmproj-")]
    texts = [path for path in files if path not in mmprojs]
    if len(mmprojs) != 1 or len(texts) != 1:
        names = [path.name for path in files]
        raise ArtifactError(f"{folder}: {names} is not one text GGUF and one mmproj-*.gguf")
    return texts[0], mmprojs[0]


def _configured_eos(folder: Path) -> Any:
    path = folder / "generation_config.json"
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tree.get("eos_token_id")
