"""From token ids to text as it grows: never half a character, never a stop string."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, so also the most byte-fallback tokens that one character takes."""


class Detokenizer:
    """Turn one sequence's ids into text piece by piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The last piece shown is decoded again with the next, so that its leading space is kept.
        self._start = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """Return the text that the token completes; empty in the middle of a character."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return what is left at the end: replacement characters for a broken one."""
        return self._take(self._pending())

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _take(self, text: str) -> str:
        if text:
            self._start = self._read
        self._read = len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class StopText:
    """Hold text back while it may be the start of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._kept = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show; once a stop string has come, `stopped` is set."""
        if not self._stop:
            return text
        self._kept += text
        found = [at for stop in self._stop if (at := self._kept.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._kept = self._kept[: min(found)], ""
            return shown
        keep = max(_overlap(self._kept, stop) for stop in self._stop)
        shown = self._kept[: len(self._kept) - keep]
        self._kept = self._kept[len(self._kept) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was kept back, at the end of an answer that did not stop."""
        shown, self._kept = self._kept, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
