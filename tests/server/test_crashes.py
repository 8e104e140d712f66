"""An engine that native code ends is told in one line by the process that takes its place."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_ray.server.crashes import engine_name, last_crash

NAME = engine_name("gguf-q4_k_m")


def run_engine(how: str) -> list[str]:
    """Return what such a process logs."""
    lines = (
        "import os, signal",
        "from llava_ray.server.crashes import record_crashes",
        f"record_crashes({NAME!r})",
        "def decode():",
        f"    {how}",
        "decode()",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return done.stderr.splitlines()


def test_the_next_process_tells_how_the_last_one_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path))
    start = time.time()
    assert run_engine("pass") == []
    assert last_crash(NAME, start) is None
    assert run_engine("os.kill(os.getpid(), signal.SIGSEGV)") == []
    told = last_crash(NAME, start)
    assert told is not None and told.startswith("died by SIGSEGV in decode (<string>:5): ")
    assert last_crash(engine_name("gguf-q4_k"), start) is None
    assert last_crash(NAME, time.time() + 5) is None

    (line,) = run_engine("pass")
    assert line.startswith("engine gguf-q4_k_m: its last process died by SIGSEGV in decode")
    assert run_engine("pass") == []
    stack = Path(line.rpartition("(stack: ")[2].rstrip(")"))
    assert "Fatal Python error: Segmentation fault" in stack.read_text()
    assert last_crash(NAME, start) is not None
    assert len(list((tmp_path / "crashes").iterdir())) == 2, "the stack, and the last file"
