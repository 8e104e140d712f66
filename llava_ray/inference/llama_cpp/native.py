"""The calls into llama.cpp that need care: its logs, its models and its batches.

Arrays are NumPy's and handed over by address, so a decoded token costs no Python loop.
"""

import ctypes
import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_ray.errors import VariantError

logger = logging.getLogger(__name__)

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR; all below, hundreds of lines per model, goes to DEBUG."""

_last_errors: deque[str] = deque(maxlen=3)
_callbacks: list[Any] = []


def load_llama_cpp() -> Any:
    """Import llama_cpp, its logs sent to logging.

    Raises VariantError that names the extra when the package is missing.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise VariantError(
            "GGUF needs 'pip install llava_ray[gguf]' on the worker image "
            f"({type(error).__name__}: {error})"
        ) from error
    if not _callbacks:
        from llama_cpp import mtmd_cpp

        # Kept: llama.cpp calls it for as long as the process lives.
        _callbacks.append(llama_cpp.llama_log_callback(_log))
        nothing = ctypes.c_void_p(0)
        llama_cpp.llama_log_set(_callbacks[0], nothing)
        mtmd_cpp.mtmd_log_set(_callbacks[0], nothing)
        mtmd_cpp.mtmd_helper_log_set(_callbacks[0], nothing)
    return llama_cpp


def open_model(path: Path, **settings: Any) -> Any:
    """Open a GGUF with these of llama_model_params; raise VariantError with llama.cpp's reason."""
    llama = load_llama_cpp()
    params = llama.llama_model_default_params()
    for name, value in settings.items():
        setattr(params, name, value)
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise VariantError(f"llama.cpp cannot open {path.name}: {last_error()}")
    return model


def last_error() -> str:
    """Return what llama.cpp said last of an error, for messages."""
    return " ".join(_last_errors) or "llama.cpp gave no reason"


def _log(level: int, text: bytes, _: Any) -> None:
    line = " ".join(text.decode("utf-8", errors="replace").replace("==", "").split())
    if level == _ERROR and line:
        _last_errors.append(line)
    if line:
        logger.log(logging.WARNING if level == _ERROR else logging.DEBUG, "%s", line)


class Batch:
    """What llama_decode takes: up to `capacity` tokens or embeddings, with slots and positions."""

    def __init__(self, llama_cpp: Any, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self.positions: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self.slots: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self.wanted: NDArray[np.int8] = np.zeros(capacity, dtype=np.int8)
        """1 where logits are to be computed."""
        self._one_each: NDArray[np.int32] = np.ones(capacity, dtype=np.int32)
        # llama.cpp allows a token several sequences, so it takes a pointer per token.
        self._slot_pointers = self.slots.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self._struct = llama_cpp.llama_batch()
        types = dict(llama_cpp.llama_batch._fields_)
        self._token_pointer = ctypes.cast(self.tokens.ctypes.data, types["token"])
        self._embd_type = types["embd"]
        for field, array in (
            ("pos", self.positions),
            ("n_seq_id", self._one_each),
            ("seq_id", self._slot_pointers),
            ("logits", self.wanted),
        ):
            setattr(self._struct, field, ctypes.cast(array.ctypes.data, types[field]))

    def of_tokens(self, count: int) -> Any:
        """Return the llama_batch of the first `count` tokens."""
        self._struct.n_tokens, self._struct.token = count, self._token_pointer
        self._struct.embd = None
        return self._struct

    def of_embeddings(self, embeddings: NDArray[np.float32]) -> Any:
        """Return the llama_batch of embeddings [count, hidden], which must outlive the call."""
        self._struct.n_tokens, self._struct.token = len(embeddings), None
        self._struct.embd = ctypes.cast(embeddings.ctypes.data, self._embd_type)
        return self._struct
