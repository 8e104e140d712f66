"""CLIP and projector through llama.cpp's mtmd library, patched where it departs from LLaVA.

ggml's scheduler calls back at each node of a graph; there the tensors can be read and changed.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp.native import last_error, load_llama_cpp
from llava_ray.models.images import Pixels

_ACTIVATIONS = {
    b"GELU": torch.nn.functional.gelu,
    b"GELU_QUICK": lambda x: x * torch.sigmoid(1.702 * x),
}


class PatchEmbedding:
    """CLIP's first layer as the mmproj file has it: kernel, class token, mean and deviation."""

    def __init__(self, mmproj: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(mmproj)
        found = {str(tensor.name): tensor.data for tensor in reader.tensors}
        try:
            self.class_token: NDArray[np.float32] = np.array(found["v.class_embd"], dtype="f4")
            self._kernel = torch.from_numpy(np.array(found["v.patch_embd.weight"], dtype="f4"))
            self._mean, self._std = (
                torch.tensor(reader.fields[f"clip.vision.image_{name}"].contents())[:, None, None]
                for name in ("mean", "std")
            )
        except KeyError as error:
            raise VariantError(f"{mmproj.name} has no {error}: write the pair again") from error

    def __call__(self, pixels: Pixels) -> NDArray[np.float32]:
        """Return an image's patches [patches, hidden] in fp32."""
        image = torch.from_numpy(np.array(pixels)).movedim(-1, 0).float() / 255
        image = (image - self._mean) / self._std
        grid = torch.nn.functional.conv2d(image, self._kernel, stride=self._kernel.shape[-1])
        return grid.flatten(1).T.contiguous().numpy()


class GraphHooks:
    """Put CLIP's class token before the patches; on demand compute all of CLIP in fp32.

    llama.cpp's LLaVA graph appends the class token but numbers positions, and drops a row, as if
    it came first: every patch gets its neighbour's position, the first patch is lost and the
    class token takes the last one's place. So the rows are rolled where both are joined.
    Its patches are rounded to 16 bits, and its GELUs are a table of 16-bit values (by the tanh
    formula): `exact` replaces both.
    Source: llama.cpp, tools/mtmd/models/llava.cpp, clip_graph_llava::build.
    """

    def __init__(self, llama_cpp: Any, embedding: PatchEmbedding, *, exact: bool) -> None:
        self._ggml = _ggml_functions()
        self._embedding = embedding
        self._exact = exact
        self._patches: NDArray[np.float32] | None = None
        self._last_sum: NDArray[np.float32] | None = None
        self.met = True
        """Whether the node that joins patches and class token has come since `start`."""
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._at_node)

    def start(self, pixels: Pixels) -> None:
        """Say that the graph is about to run on an image."""
        self.met, self._last_sum = False, None
        self._patches = self._embedding(pixels) if self._exact else None

    def _at_node(self, tensor: int, ask: bool, _: Any) -> bool:
        """Say whether a node's result is wanted (`ask`), or take it; True goes on."""
        operation: bytes = self._ggml.ggml_op_desc(tensor)
        if ask:
            return (operation == b"CONCAT" and not self.met) or (
                self._exact and (operation == b"ADD" or operation in _ACTIVATIONS)
            )
        if operation == b"CONCAT":
            self._join(tensor)
        elif operation == b"ADD":
            # A bias precedes each activation, so this is its input.
            self._last_sum = self._read(tensor)
        elif self._last_sum is not None:
            values = _ACTIVATIONS[operation](torch.from_numpy(self._last_sum)).numpy()
            self._write(tensor, values)
        return True

    def _join(self, tensor: int) -> None:
        self.met = True
        class_token = self._embedding.class_token
        if self._patches is not None:
            self._write(tensor, np.concatenate([class_token[None], self._patches]))
            return
        rows = self._read(tensor).reshape(-1, len(class_token))
        # A llama.cpp that appends no more is left alone.
        if np.array_equal(rows[-1], class_token):
            self._write(tensor, np.roll(rows, 1, axis=0))

    def _read(self, tensor: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = np.empty(
            self._ggml.ggml_nbytes(tensor) // 4, dtype=np.float32
        )
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def _write(self, tensor: int, values: NDArray[np.float32]) -> None:
        assert self._ggml.ggml_nbytes(tensor) == values.nbytes
        self._ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


class ImageEncoder:
    """CLIP and projector of an mmproj file."""

    def __init__(
        self,
        mmproj: Path,
        model: Any,
        *,
        hidden: int,
        threads: int,
        gpu: bool,
        exact: bool,
    ) -> None:
        llama_cpp = load_llama_cpp()
        from llama_cpp import mtmd_cpp

        self._mtmd: Any = mtmd_cpp
        self._hidden = hidden
        self._hooks = GraphHooks(llama_cpp, PatchEmbedding(mmproj), exact=exact)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads = gpu, threads
        params.print_timings = params.warmup = False
        params.cb_eval = self._hooks.callback
        if exact:
            params.flash_attn_type = 0
        self._context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), model, params)
        if not self._context:
            raise VariantError(f"llama.cpp cannot open {mmproj.name}: {last_error()}")

    def encode(self, pixels: Pixels) -> NDArray[np.float32]:
        """Return an image's embeddings [tokens, hidden].

        Pixels of exactly the model's size pass llama.cpp's own preprocessing unchanged.
        """
        mtmd = self._mtmd
        contiguous = np.ascontiguousarray(pixels)
        data = contiguous.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(contiguous.shape[1], contiguous.shape[0], data)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            part = mtmd.mtmd_input_part(None, bitmap)
            parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
            self._must(mtmd.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False))
            return self._encode_chunks(chunks, contiguous)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def close(self) -> None:
        """Free the encoder."""
        self._mtmd.mtmd_free(self._context)

    def _encode_chunks(self, chunks: Any, pixels: Pixels) -> NDArray[np.float32]:
        mtmd, found = self._mtmd, []
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            self._hooks.start(pixels)
            self._must(mtmd.mtmd_encode_chunk(self._context, chunk))
            if not self._hooks.met:
                raise VariantError(
                    "this llama.cpp joins CLIP's class token in an unknown way, so its image "
                    "embeddings cannot be trusted; install 'llava_ray[gguf]'"
                )
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), self._hidden)
            output = mtmd.mtmd_get_output_embd(self._context)
            # Copied: the next image overwrites llama.cpp's buffer.
            found.append(np.ctypeslib.as_array(output, shape=shape).copy())
        return np.concatenate(found)

    def _must(self, code: int) -> None:
        if code != 0:
            raise VariantError(f"llama.cpp cannot encode the image ({code}): {last_error()}")


def _ggml_functions() -> Any:
    """Return ggml's library, the argument types of what is used here declared."""
    from llama_cpp import _ggml

    library: Any = _ggml.libggml
    library.ggml_op_desc.restype = ctypes.c_char_p
    library.ggml_op_desc.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    move = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_tensor_get.argtypes = move
    library.ggml_backend_tensor_set.argtypes = move
    return library
