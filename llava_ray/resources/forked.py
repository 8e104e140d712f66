"""Work in a process of its own, which native code may end without ending its caller.

Python's fork server imports the large libraries once; a child then starts in milliseconds instead
of ten seconds, and its memory is that of its own work.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from llava_ray.console import set_up_logging
from llava_ray.errors import ResourceError
from llava_ray.resources.crash import crash_file, crash_recorded, read_crash

T = TypeVar("T")

# CUDA does not survive a fork, and nothing here may start it.
_IMPORTED_ONCE = (
    "__main__",
    "ray.cloudpickle",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "rouge_score.rouge_scorer",
)


class Forked(Generic[T]):
    """A child process at work; leaving the context ends it."""

    def __init__(self, name: str, work: Callable[..., T], *arguments: Any) -> None:
        """Start it; the first one of a process also starts the server, for some seconds.

        name: names the file with the stack should the child crash.
        """
        # Else torch.cuda.is_available(), which libraries call at import, would start CUDA.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTED_ONCE))
        self._name = name
        self._receiver, sender = context.Pipe(duplex=False)
        # The server's environment is of another time: Ray sets GPUs and threads for each task.
        task = _dumps((dict(os.environ), name, work, arguments))
        self._process = context.Process(target=_run, args=(sender, task), daemon=True)
        self._process.start()
        sender.close()

    def __enter__(self) -> "Forked[T]":
        return self

    def __exit__(self, *_: object) -> None:
        # Programs that the child has started are in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def result(self) -> T:
        """Wait for the result.

        Raises what the work raised, and ResourceError with the signal where the process died.
        """
        try:
            done, value = pickle.loads(self._receiver.recv_bytes())
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            crash = read_crash(crash_file(self._name), code)
            reason = crash.describe() if crash else f"its process ended with exit code {code}"
            raise ResourceError(reason) from None
        if not done:
            raise value
        result: T = value
        return result


def run_forked(name: str, work: Callable[..., T], *arguments: Any) -> T:
    """Do work in a child to its end; as `Forked.result`. A Ray task that may crash runs this."""
    with Forked(name, work, *arguments) as child:
        return child.result()


def _run(sender: Any, task: bytes) -> None:
    environment, name, work, arguments = pickle.loads(task)
    os.environ.clear()
    os.environ.update(environment)
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What Ray does at a worker's start: logging, and as many threads as the task has CPUs.
    set_up_logging()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    with crash_recorded(name):
        try:
            answer = _pickled((True, work(*arguments)))
        except Exception as error:
            # Pickle drops the traceback.
            error.add_note("".join(traceback.format_exception(error)))
            answer = _pickled((False, error))
    sender.send_bytes(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _pickled(answer: tuple[bool, Any]) -> bytes:
    try:
        data = _dumps(answer)
        pickle.loads(data)
    except Exception:
        data = _dumps((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
    return data


def _dumps(value: Any) -> bytes:
    """Pickle functions by value too, where they can be imported nowhere."""
    from ray import cloudpickle

    data: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return data
