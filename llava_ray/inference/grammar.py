"""Answers that keep to a grammar, such as a JSON schema's, by llguidance.

Before each token the grammar's matcher says which ones may follow; all others get no probability.

Run as a module it compiles the schema on its stdin and prints the grammar: some schemas take more
time and memory than there is, so the first try is made where the system can end it.
"""

import asyncio
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from llava_ray.errors import DataError
from llava_ray.inference.request_errors import Overloaded

_COMPILE_S = 2
"""Of processor time."""
_COMPILE_BYTES = 1 << 30
_TRIED_BYTES = 16
"""Of an answer, as a trial."""
_KEPT = 256
"""Schemas whose grammars are remembered."""
_MOST_WAITING = 6


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a JSON schema, as `GrammarCompiler` takes it.

    Raises DataError for a schema that llguidance cannot follow, with its words, that no text keeps
    to, or that takes too much to compile.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(schema),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            # Ray may have added to the path of this process alone.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
        },
    )
    if done.returncode < 0:
        raise DataError(
            f"it takes more than {_COMPILE_S} s or {_COMPILE_BYTES >> 20} MiB to compile: simplify "
            "what counts or repeats, such as multipleOf and patterns"
        )
    if done.returncode:
        raise DataError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


class Schemas:
    """The grammars of the schemas that were asked for last, and why others have none.

    Belongs to one event loop. Few are compiled at a time, so that slow ones leave threads and
    processors to others.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, str | DataError] = OrderedDict()
        self._compiling: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(2)

    async def grammar(self, schema: Mapping[str, Any]) -> str:
        """Return what `json_grammar` does; raises Overloaded where many new ones wait, too."""
        key = json.dumps(schema)
        if key not in self._known:
            if key not in self._compiling:
                if len(self._compiling) >= _MOST_WAITING:
                    raise Overloaded("many new schemas are being compiled: try again later")
                self._compiling[key] = asyncio.create_task(self._compile(key, schema))
            # Others may wait for the same one.
            await asyncio.shield(self._compiling[key])
        self._known.move_to_end(key)
        found = self._known[key]
        if isinstance(found, DataError):
            raise DataError(str(found))
        return found

    async def _compile(self, key: str, schema: Mapping[str, Any]) -> None:
        try:
            async with self._turn:
                self._known[key] = await asyncio.to_thread(json_grammar, schema)
        except DataError as error:
            self._known[key] = error
        finally:
            del self._compiling[key]
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)


def _compile_stdin() -> None:
    from llguidance import LLMatcher, LLTokenizer

    # Of what it may write to, not of addresses: each thread of a large machine reserves many.
    there = psutil.Process().memory_info()
    limit = getattr(there, "data", there.vms) + _COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    spent_s = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent_s + _COMPILE_S,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Free whitespace would let a small model go on with nothing else.
    options: Any = {"whitespace_pattern": r"[ \n]?"}
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(sys.stdin.read(), overrides=options)
    except ValueError as error:
        sys.exit(_line(str(error)))
    # Its tokens are the bytes, and special ones behind them.
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    for place in range(_TRIED_BYTES):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        letters = np.flatnonzero(np.unpackbits(bits[: 256 // 8], bitorder="little"))
        problem = _line(matcher.get_error())
        if problem == "NoExtensionBias" or (place == 0 and not problem and not len(letters)):
            problem = "no text keeps to it, as where it refers to itself alone"
        if problem:
            large = any(word in problem for word in ("max is", "fuel", "too many"))
            sys.exit(f"it is too large ({problem})" if large else problem)
        if not len(letters):
            break
        # Rather into an object, by its quotes, than out of it.
        matcher.consume_token(int(next(iter(letters[letters > ord(" ")]), letters[0])))
    sys.stdout.write(grammar)


def _line(error: str) -> str:
    """Return llguidance's words without the matcher's state behind them."""
    return " ".join(error.partition("<state>")[0].split())


class GrammarCompiler:
    """GrammarCompiler for one model's tokens."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_id: int) -> None:
        """tokenizer: a fast Hugging Face one, read when the first grammar comes."""
        self._hf_tokenizer = tokenizer
        self._vocab_size, self._eos_token_id = vocab_size, eos_token_id
        self._tokenizer: Any = None

    def start(self, grammar: str) -> "Matcher":
        """Return what follows one answer.

        Raises DataError where the grammar is too large.
        """
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        if self._tokenizer is None:
            self._tokenizer = from_tokenizer(
                self._hf_tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_token_id
            )
        matcher = Matcher(LLMatcher(self._tokenizer, grammar, log_level=0), self._vocab_size)
        if matcher.failure:
            raise DataError(matcher.failure)
        return matcher


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether the answer keeps to the grammar and nothing can follow any more."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def failure(self) -> str:
        """Why the answer cannot be followed any further, such as its length; empty if it can."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may follow, bool [vocab_size]."""
        if self._matcher.is_stopped():
            return np.ones(self._vocab_size, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)


if __name__ == "__main__":
    _compile_stdin()
