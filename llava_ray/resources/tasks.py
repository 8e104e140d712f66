"""Ray tasks side by side, the work of each in a child process; what fails stops no other."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llava_ray.errors import LlavaRayError, StorageError, VariantError
from llava_ray.resources.capacity import Resources
from llava_ray.resources.crash import last_line
from llava_ray.resources.forked import run_forked

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 5.0
_LOG_EVERY_S = 30.0


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
        """Hand it to Ray; return a generator that gives a _Runs once it runs, then its result."""
        import ray

        remote: Any = ray.remote(_announced)
        remote = remote.options(
            **self.resources.options(), name=self.name, max_retries=1, num_returns="streaming"
        )
        name = f"{self.name} {secrets.token_hex(4)}"
        return remote.remote(self.entry, name, self.work, *self.arguments)


class _Runs:
    """Comes before a task's result: a node has taken it."""


def _announced(entry: Callable[..., T], *arguments: Any) -> Iterator[_Runs | T]:
    yield _Runs()
    yield entry(*arguments)


def run_task(task: Task[T], *, wait_s: float) -> T:
    """Run one to its end; wait_s as for `run_side_by_side`.

    Raises the work's own LlavaRayError, and else VariantError that says in one line why it failed.
    """
    ((_, outcome),) = run_side_by_side([task], wait_s=wait_s)
    if isinstance(outcome, LlavaRayError):
        raise outcome
    return outcome


def run_side_by_side(
    tasks: Sequence[Task[T]], *, wait_s: float, at_once: int | None = None
) -> Iterator[tuple[Task[T], T | LlavaRayError]]:
    """Start tasks in their order, and yield each with its result or its failure as it ends.

    at_once: how many Ray is given at a time; None: all. wait_s: how long those that no node has
    taken are waited for while none of them runs. Raises StorageError, which would meet the others
    too, and ends them.
    """
    import ray

    waiting = list(tasks)
    given: dict[Any, Task[T]] = {}
    running: set[Any] = set()
    last_ran = logged = time.monotonic()
    try:
        while waiting or given:
            while waiting and len(given) < (at_once or len(tasks)):
                task = waiting.pop(0)
                given[task.start()] = task
            ready: list[Any] = ray.wait(list(given), num_returns=1, timeout=min(_POLL_S, wait_s))[0]
            for stream in ready:
                outcome = _outcome(next(stream))
                if isinstance(outcome, _Runs):
                    running.add(stream)
                    continue
                running.discard(stream)
                task = given.pop(stream)
                if isinstance(outcome, StorageError):
                    raise outcome
                yield task, outcome
            now = time.monotonic()
            if running or not given:
                last_ran = logged = now
            elif now - last_ran > wait_s:
                for task in given.values():
                    lack = f"no node had {task.resources} for it within resources.wait_s={wait_s:g}"
                    yield task, LlavaRayError(lack)
                return
            elif now - logged > _LOG_EVERY_S:
                logged = now
                task = next(iter(given.values()))
                logger.info("%s waits for a node with %s", task.name, task.resources)
    finally:
        for stream in given:
            ray.cancel(stream)


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
