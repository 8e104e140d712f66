"""Native crashes in one line: the signal, the function and a file with the stack.

A process that may die says where its stack is to go; whoever waits for it reads that file.
"""

import faulthandler
import linecache
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llava_ray
from llava_ray.artifacts.storage import cache_folder
from llava_ray.errors import VariantError

_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGBUS, signal.SIGFPE)
"""Signals by which the system ends a process for what its own code did."""
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_COMPILE = (
    f"'{sys.executable} -m pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python'"
)
_NATIVE_CALL = re.compile(r"\b((?:llama|mtmd|ggml)_\w+)\(")


@dataclass(frozen=True)
class Crash:
    """How a process died."""

    signal: str
    """Such as `SIGSEGV`."""
    function: str
    """What was called, empty where it is unknown."""
    stack: Path
    """The file with the Python stack of every thread."""

    def describe(self) -> str:
        """Say all of it and what to do, in one line."""
        where = f" in {self.function}" if self.function else ""
        written = self.stack.is_file() and self.stack.stat().st_size > 0
        stack = f" (stack: {self.stack})" if written else ""
        return f"died by {self.signal}{where}: {self._cure()}{stack}"

    @property
    def is_fault(self) -> bool:
        """Whether the process's own code is to blame, not one who ended it or a lack of memory."""
        return self.signal in {number.name for number in _FAULTS}

    def _cure(self) -> str:
        if self.signal == "SIGKILL":
            return "probably the machine ran out of memory; use a larger one"
        if not self.is_fault:
            return "it was ended from outside; run it again"
        # Nothing is written where the signal's frame does not fit the handler's stack, as with AMX.
        llama = _NATIVE_CALL.match(f"{self.function}(") or "gguf" in self.stack.name
        if not llama:
            return "leave the variant out, and report this"
        if self.signal == "SIGILL":
            return f"llama-cpp-python was compiled for another CPU; compile it here with {_COMPILE}"
        likely = "a fault" if self.function else "perhaps a fault"
        return f"{likely} of this llama.cpp; compile it anew with {_COMPILE}, or leave it out"


def crash_file(name: str) -> Path:
    """Return where the stack of a process of that name goes, on the machine that it runs on."""
    safe = re.sub(r"[^\w.-]", "_", name)
    return cache_folder() / "crashes" / f"{safe}.txt"


@contextmanager
def crash_recorded(name: str) -> Iterator[None]:
    """Send this process's stack to `crash_file(name)` should native code end it meanwhile.

    Ray's own handler, which prints some 60 lines of native stack, is taken away for good.
    """
    path = crash_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.disable()  # Else it would not put its own handlers over those below again.
    if threading.current_thread() is threading.main_thread():
        for number in _FAULTS:
            signal.signal(number, signal.SIG_DFL)
    with path.open("w", encoding="utf-8") as stack:
        faulthandler.enable(stack)
        try:
            yield
        finally:
            faulthandler.disable()
    path.unlink(missing_ok=True)


def read_crash(path: Path, exit_code: int) -> Crash | None:
    """Read what a dead process left; None where no signal ended it.

    exit_code: as subprocess has it, -N where signal N did.
    """
    if exit_code >= 0:
        return None
    number = -exit_code
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    threads = re.split(r"^(?=Thread |Current thread )", text, flags=re.MULTILINE)
    current = next((part for part in threads if part.startswith("Current")), "")
    # A thread of native code's own has no Python frame; the main thread, listed last, does.
    frame = _FRAME.search(current) or _FRAME.search(threads[-1])
    known = number in signal.Signals.__members__.values()
    name = signal.Signals(number).name if known else f"signal {number}"
    if frame is None:
        return Crash(name, "", path)
    # The native function that the line calls, else the Python function and its line.
    call = _NATIVE_CALL.search(linecache.getline(frame[1], int(frame[2])))
    return Crash(name, call[1] if call else f"{frame[3]} ({Path(frame[1]).name}:{frame[2]})", path)


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    name: str,
    before: Path | None = None,
    capture: bool = False,
) -> tuple[str, Crash | None]:
    """Run `python -m module` to its end; return its stdout if captured, and how it died if it did.

    before: a folder of packages that go before this environment's. Raises VariantError with the
    last line of stderr for an ordinary failure.
    """
    path = crash_file(f"{name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    roots = [str(before or ""), str(Path(llava_ray.__file__).parents[1])]
    roots.append(os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [sys.executable, "-X", "faulthandler", "-m", module, *arguments]
    with path.open("w", encoding="utf-8") as stderr:
        stdout = subprocess.PIPE if capture else None
        done = subprocess.run(command, stdout=stdout, stderr=stderr, env=environment, text=True)
    printed = done.stdout or ""
    if crash := read_crash(path, done.returncode):
        return printed, crash
    said = last_line(path.read_text(encoding="utf-8", errors="replace"))
    path.unlink()
    if done.returncode:
        raise VariantError(f"{name}: {said.removeprefix('error: ')}")
    return printed, None


def last_line(text: str) -> str:
    """Return the last line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i)error|.*error:", line)]
    found = (errors or lines or ["no message"])[-1][:500]
    return re.sub(r"^llava_ray\.errors\.\w+: ", "", found)
