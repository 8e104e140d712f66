"""Ray tasks side by side, the work of each in a child process; what fails stops no other."""

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llava_ray.errors import LlavaRayError, StorageError, VariantError
from llava_ray.resources.capacity import Resources, free_nodes
from llava_ray.resources.crash import last_line
from llava_ray.resources.forked import run_forked

T = TypeVar("T")

_POLL_S = 5.0


@dataclass(frozen=True)
class Task(Generic[T]):
    """One piece of work, for a Ray task that is tried once more where its worker dies."""

    name: str
    """Shown by Ray's dashboard; it also names the file with the stack of a crash."""
    resources: Resources
    work: Callable[..., T]
    arguments: tuple[Any, ...]
    entry: Callable[..., T] = run_forked
    """What the Ray task runs; takes a name, the work and its arguments."""

    def start(self) -> Any:
        """Hand it to Ray and return the reference of its result."""
        import ray

        options: Any = {**self.resources.options(), "name": self.name, "max_retries": 1}
        remote: Any = ray.remote(self.entry).options(**options)
        return remote.remote(f"{self.name} {secrets.token_hex(4)}", self.work, *self.arguments)


def run_task(task: Task[T]) -> T:
    """Run one to its end.

    Raises the work's own LlavaRayError, and else VariantError that says in one line why it failed.
    """
    outcome: T | LlavaRayError = _outcome(task.start())
    if isinstance(outcome, LlavaRayError):
        raise outcome
    return outcome


def run_side_by_side(
    tasks: Sequence[Task[T]], *, at_once: int | None = None, placement_timeout_s: float = math.inf
) -> Iterator[tuple[Task[T], T | LlavaRayError]]:
    """Start tasks in their order, and yield each with its result or its failure as it ends.

    at_once: how many Ray is given at a time; None: all. placement_timeout_s: after that long a task
    that no node could run is given up. Raises StorageError, which would meet the others too, and
    ends them.
    """
    import ray

    waiting = list(tasks)
    running: dict[Any, tuple[Task[T], float]] = {}
    poll_s = min(_POLL_S, placement_timeout_s / 2 + 0.1)
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or len(tasks)):
                task = waiting.pop(0)
                running[task.start()] = task, time.monotonic() + placement_timeout_s
            for ref in ray.wait(list(running), num_returns=1, timeout=poll_s)[0]:
                task, _ = running.pop(ref)
                outcome = _outcome(ref)
                if isinstance(outcome, StorageError):
                    raise outcome
                yield task, outcome
            overdue = [ref for ref, (_, deadline) in running.items() if deadline < time.monotonic()]
            nodes = free_nodes() if overdue else []
            for ref in overdue:
                if lack := running[ref][0].resources.shortage(nodes):
                    ray.cancel(ref)
                    yield running.pop(ref)[0], LlavaRayError(lack)
    finally:
        for ref in running:
            ray.cancel(ref)


def _outcome(ref: Any) -> Any:
    """Wait for a result, or for the error that says why there is none."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        # Ray's wrapper prints the task's traceback; its cause is the error itself.
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, LlavaRayError):
            return cause
        reason = f"{type(cause).__name__}: {last_line(str(cause))}"
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            reason = "its process was ended because the node ran out of memory: use a larger node"
        elif isinstance(error, ray.exceptions.WorkerCrashedError):
            reason = "its worker process died (killed, or out of memory): see the node's Ray logs"
        failure = VariantError(reason)
        failure.__cause__ = error
        return failure
