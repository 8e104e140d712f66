"""A llama.cpp that crashes costs a line, never the process (A1, A2).

A library that is loaded before llama.cpp stands in for the faulty build: it ends the process where
the real fault does, in what the extra buffer types compute, or in every graph.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_inputs import small_model, write_f32

from llava_ray.errors import VariantError
from llava_ray.inference.llama_cpp import trial as llama_trial
from llava_ray.inference.llama_cpp.trial import check_file, extra_buffers, features

FAULT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <string.h>

static void *real(const char *name) {
    return dlsym(dlopen("libggml.so.0", RTLD_LAZY | RTLD_NOLOAD), name);
}

#ifdef FATAL
int ggml_backend_sched_graph_compute_async(void *sched, void *graph) { return raise(FATAL); }
#else
void *ggml_backend_reg_get_proc_address(void *reg, const char *name) {
    if (strcmp(name, "ggml_backend_dev_get_extra_bufts") == 0) raise(SIGSEGV);
    return ((void *(*)(void *, const char *)) real("ggml_backend_reg_get_proc_address"))(reg, name);
}
#endif
"""

OPEN_AND_SCORE = """
import sys
from pathlib import Path
from llava_ray.quantize.gguf_parity import check_parity
print(check_parity(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def faulty(folder: Path, *options: str) -> str:
    """Compile the fault and return its library."""
    source, library = folder / "fault.c", folder / f"fault{len(options)}.so"
    source.write_text(FAULT)
    command = ["cc", "-shared", "-fPIC", *options, str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    llama_trial._fault.cache_clear()
    yield tmp_path / "cache"
    llama_trial._fault.cache_clear()


def test_extra_buffer_types_that_crash_are_off_and_models_open_without_them(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", faulty(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not extra_buffers()
    assert "died by SIGSEGV in llama_model_load_from_file" in caplog.text
    assert "extra buffer types off: at f32 it died by SIGSEGV" in features()
    (stack,) = (cache / "crashes").glob("*.txt")
    assert "Fatal Python error: Segmentation fault" in stack.read_text()
    merged = small_model(tmp_path / "merged")
    pair = write_f32(merged, tmp_path / "pair")
    check_file(pair / "llava-f32.gguf", 1)
    # The engine in a process of its own: were the types on there, it would die.
    command = [sys.executable, "-c", OPEN_AND_SCORE, str(merged), str(pair)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-2


def test_the_trial_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = extra_buffers()
    llama_trial._fault.cache_clear()
    monkeypatch.setattr(llama_trial, "run_child", None)
    assert extra_buffers() == works
    (record,) = (cache / "llama_cpp").glob("*.json")
    # As a full disk leaves it, of another version, or changed by hand.
    for text in ("", "[]", "null", '"x"', '{"fault": 5}', '{"fault": null}', "{}", "\0"):
        record.write_text(text)
        llama_trial._fault.cache_clear()
        with pytest.raises(TypeError):
            extra_buffers()
    record.unlink()
    record.mkdir()
    llama_trial._fault.cache_clear()
    with pytest.raises(TypeError):
        extra_buffers()
    record.rmdir()
    with pytest.raises(TypeError):
        extra_buffers()


def test_a_trial_that_was_killed_is_not_remembered(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", faulty(tmp_path, "-DFATAL=SIGKILL"))
    assert not extra_buffers()
    assert not (cache / "llama_cpp").exists()
    llama_trial._fault.cache_clear()
    monkeypatch.setenv("LD_PRELOAD", faulty(tmp_path, "-DFATAL=SIGILL"))
    assert "; without them it died by SIGILL" in features()
    assert (cache / "llama_cpp").exists()


def test_a_file_that_kills_llama_cpp_is_told_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_f32(small_model(tmp_path / "merged"), tmp_path / "pair")
    extra_buffers()
    monkeypatch.setenv("LD_PRELOAD", faulty(tmp_path, "-DFATAL=SIGILL"))
    with pytest.raises(VariantError) as caught:
        check_file(pair / "llava-f32.gguf", 1)
    line = str(caught.value)
    assert "\n" not in line
    assert "llava-f32.gguf: scoring 32 tokens, llama.cpp died by SIGILL in llama_decode" in line
    assert "compiled for another CPU" in line
    stack = Path(line.rpartition("(stack: ")[2].rstrip(")"))
    assert "_score" in stack.read_text()


def test_a_broken_file_says_llama_cpps_reason(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(VariantError, match=r"llama.cpp cannot open broken\.gguf"):
        check_file(broken, 1)


def test_the_features_are_named() -> None:
    named = features()
    assert "OPENMP" in named
    assert named.endswith("; extra buffer types on") or "; extra buffer types off: at " in named
