"""llama.cpp tried in a child process, so that what kills the child kills nothing else.

python -m llava_ray.inference.llama_cpp.trial [--plain] [--threads N] [FILE.gguf]
Without a file a tiny one of each type is made and scored.
Some compilers break llama.cpp's extra buffer types: gcc before 13 writes the AMX tile
configuration wrongly, and the first product of several rows ends the process
(llama.cpp issue 20824). They are left off where the trial shows it.
"""

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from llava_ray.artifacts.storage import cache_folder
from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp.native import Batch, last_error, load_llama_cpp, open_model
from llava_ray.resources.crash import run_child

logger = logging.getLogger(__name__)

_MODULE = "llava_ray.inference.llama_cpp.trial"
_ROWS = 32
"""Tokens of the scored batch: matrix products of several rows take other paths than of one."""
_WIDTH, _INNER, _VOCABULARY = 256, 256, 64


class _Trial(BaseModel):
    """What a trial showed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    fault: str
    """Why the extra buffer types are off; empty where they work."""


def extra_buffers() -> bool:
    """Say whether this llama.cpp's extra buffer types (repacked, AMX) work on this CPU."""
    return not _fault()


@functools.cache
def _fault() -> str:
    """Say why the extra buffer types are off; nothing where they work.

    Tried once for each build and CPU; the answer is kept in the cache folder.
    """
    record = cache_folder() / "llama_cpp" / f"{_build_and_cpu()}.json"
    # Of another version, cut off or no file: it is tried again.
    with contextlib.suppress(OSError, ValidationError):
        return _Trial.model_validate_json(record.read_bytes()).fault
    printed, crash = run_child(_MODULE, [], name="gguf-trial", capture=True)
    fault = ""
    if crash is not None:
        fault = f"at {(printed.split() or ['its start'])[-1]} it {crash.describe()}"
        _, also = run_child(_MODULE, ["--plain"], name="gguf-trial-plain", capture=True)
        if also is not None:
            fault += f"; without them it {also.describe()}"
        logger.warning("llama.cpp's extra buffer types are off: %s", fault)
    if crash is None or crash.is_fault:
        # A cache that cannot be written costs another trial.
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            draft = record.with_suffix(f".{os.getpid()}")
            draft.write_text(_Trial(fault=fault).model_dump_json(), encoding="utf-8")
            draft.replace(record)
    return fault


def features() -> str:
    """Name what of the CPU this llama.cpp uses, and whether its extra buffer types are on."""
    llama = load_llama_cpp()
    found = llama.llama_print_system_info().decode("utf-8", errors="replace")
    pairs = [part.rpartition(":")[2].partition("=") for part in found.split("|")]
    names = [name.strip() for name, _, value in pairs if value.strip() not in ("", "0")]
    fault = _fault()
    return f"{', '.join(names)}; extra buffer types {f'off: {fault}' if fault else 'on'}"


def check_file(path: Path, threads: int) -> None:
    """Score some tokens of a text GGUF in a child process.

    Raises VariantError with its reason, or with the signal and the function where it dies.
    """
    plain = [] if extra_buffers() else ["--plain"]
    arguments = [*plain, "--threads", str(threads), str(path)]
    _, crash = run_child(_MODULE, arguments, name=f"check-{path.name}")
    if crash is not None:
        raise VariantError(f"{path.name}: scoring {_ROWS} tokens, llama.cpp {crash.describe()}")


def _build_and_cpu() -> str:
    """Name llama.cpp's libraries by their content and the CPU by its model and features."""
    llama = load_llama_cpp()
    digest = hashlib.sha256()
    for library in sorted(Path(llama.__file__).parent.glob("lib/*")):
        if library.is_file():
            digest.update(library.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = ("model name", "flags", "Features", "CPU part")
    digest.update(repr(sorted({x for x in lines if x.startswith(names)})).encode())
    return digest.hexdigest()[:16]


def _score(path: Path, *, extra: bool, threads: int) -> None:
    """Decode a batch of tokens, then one more; raises VariantError for what is not finite."""
    llama = load_llama_cpp()
    model = open_model(path, n_gpu_layers=0, use_extra_bufts=extra)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, _ROWS, _ROWS
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise VariantError(f"llama.cpp has no memory for {path.name}: {last_error()}")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = Batch(llama, _ROWS)
    for start, count in ((0, _ROWS), (_ROWS, 1)):
        batch.positions[:count] = np.arange(start, start + count)
        batch.tokens[:count] = (7 * batch.positions[:count] + 3) % vocabulary
        batch.wanted[:] = 0
        batch.wanted[count - 1] = 1
        if llama.llama_decode(context, batch.of_tokens(count)) != 0:
            raise VariantError(f"llama_decode failed: {last_error()}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(vocabulary,))
        if not np.isfinite(logits).all():
            raise VariantError(f"{path.name} gives logits that are not finite")
    llama.llama_free(context)
    llama.llama_model_free(model)


def _score_each_type(*, extra: bool, threads: int) -> None:
    """Make and score a tiny file of every type, its name printed first."""
    from llava_ray.inference.llama_cpp.types import FILE_TYPES, NEEDS_IMATRIX

    llama = load_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "target.gguf"
        _write_tiny(source)
        for name, number in FILE_TYPES.items():
            if name in NEEDS_IMATRIX:
                continue
            print(name, flush=True)
            params = llama.llama_model_quantize_default_params()
            params.ftype, params.nthread = number, threads
            if llama.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
                raise VariantError(f"llama.cpp cannot write {name}: {last_error()}")
            _score(target, extra=extra, threads=threads)


def _write_tiny(path: Path) -> None:
    """Write a Llama of one layer with random weights and no tokenizer."""
    from gguf import GGUFWriter

    writer: Any = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // 4)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (_VOCABULARY, _WIDTH),
        "output": (_VOCABULARY, _WIDTH),
        **{f"blk.0.attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (_INNER, _WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down": (_WIDTH, _INNER),
    }
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, dtype=np.float32))
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) / 16
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--plain", action="store_true", help="without extra buffer types")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    extra = not args.plain
    if args.file is None:
        _score_each_type(extra=extra, threads=args.threads)
    else:
        _score(args.file, extra=extra, threads=args.threads)


if __name__ == "__main__":
    _main()
