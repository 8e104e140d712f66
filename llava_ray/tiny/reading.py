"""How well a caption holds the words that the picture shows."""

import re
from collections.abc import Sequence

_QUOTED = re.compile(r'["\u201c]([^"\u201d]*)["\u201d]')


def quoted_words(text: str) -> list[str]:
    """Return the words inside double quotes, in order."""
    return [word for quote in _QUOTED.findall(text) for word in quote.split()]


def word_recall(text: str, words: Sequence[str]) -> float:
    """Return the share of words, each as often as it is shown, that the text quotes exactly.

    Case and punctuation count. 1.0 for a picture without words.
    """
    if not words:
        return 1.0
    found = quoted_words(text)
    hits = 0
    for word in words:
        if word in found:
            found.remove(word)
            hits += 1
    return hits / len(words)


def character_error_rate(text: str, words: Sequence[str]) -> float:
    """Return edits per character between the quoted words and the true ones, both in order.

    0 is perfect; more than 1 is possible where the text quotes too much.
    """
    truth, read = " ".join(words), " ".join(quoted_words(text))
    if not truth:
        return 0.0 if not read else 1.0
    return _edits(truth, read) / len(truth)


def _edits(first: str, second: str) -> int:
    """Return Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            substituted = diagonal + (letter != other)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]
