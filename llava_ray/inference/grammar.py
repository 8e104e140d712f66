"""Answers that keep to a grammar, such as a JSON schema's, by llguidance.

Before each token the grammar's matcher says which ones may follow; all others get no probability.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_ray.errors import DataError


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a JSON schema, as `GrammarCompiler` takes it.

    Raises DataError for a schema that llguidance cannot follow, with its words.
    """
    from llguidance import LLMatcher

    # Free whitespace would let a small model go on with nothing else.
    options: Any = {"whitespace_pattern": r"[ \n]?"}
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        problem = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise DataError(" ".join(problem.split()))
    return grammar


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
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise DataError(" ".join(matcher.get_error().split()))
        return Matcher(matcher, self._vocab_size)


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may follow, bool [vocab_size]."""
        if self.complete:
            return np.ones(self._vocab_size, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)
