"""Clients that keep asking an endpoint while parts of it are lost, and how each request ended.

They do as OpenAI's client does by default: a request that fails before its answer began is sent
twice more, to the next address.
"""

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

ATTEMPTS = 3
_TIMEOUT_S = 30.0
_PAUSE_S = 0.5
_TOKENS = 24
_HEALTH_TRIALS = 8
"""Each is answered by a replica that Serve chooses."""


class Requests(BaseModel):
    """How the requests of a drill ended."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    whole: int
    """Answered to the end, those that were sent again counted in."""
    sent_again: int
    """Attempts that failed before their answer began."""
    cut: int
    """Ended in an error after their answer had begun."""
    lost: int
    """Failed at every attempt before an answer began."""
    longest_gap_s: float
    """The longest time in which no answer of any client ended well."""
    errors: tuple[str, ...]
    """What was said to those sent again, cut or lost."""


@dataclass
class _Tally:
    whole_at: list[float] = field(default_factory=list)
    sent_again: int = 0
    cut: int = 0
    lost: int = 0
    errors: set[str] = field(default_factory=set)


class Clients:
    """A number of threads that ask one after another until they are told to stop."""

    def __init__(self, addresses: Sequence[tuple[str, int]], *, key: str, count: int) -> None:
        self.began = time.monotonic()
        self._addresses, self._key = list(addresses), key
        self._over = threading.Event()
        self._tallies = [_Tally() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._keep_asking, args=(number,)) for number in range(count)
        ]

    def start(self) -> None:
        """Let them ask."""
        for thread in self._threads:
            thread.start()

    def whole(self) -> int:
        """Return how many answers have ended well so far."""
        return sum(len(tally.whole_at) for tally in self._tallies)

    def running(self) -> bool:
        """Say whether they still ask."""
        return any(thread.is_alive() for thread in self._threads)

    def healthy(self) -> bool:
        """Say whether every replica can answer, as far as asking a few times tells."""
        address, headers = self._addresses[0], {"Authorization": f"Bearer {self._key}"}
        for _ in range(_HEALTH_TRIALS):
            connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
            try:
                connection.request("GET", "/health", headers=headers)
                if connection.getresponse().status != 200:
                    return False
            except (http.client.HTTPException, OSError):
                return False
            finally:
                connection.close()
        return True

    def stop(self) -> Requests:
        """End them after the answers they are in, and count."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        times = sorted(t for tally in self._tallies for t in tally.whole_at)
        edges = [self.began, *times, time.monotonic()]
        gaps = [after - before for before, after in zip(edges, edges[1:], strict=False)]
        return Requests(
            whole=len(times),
            sent_again=sum(tally.sent_again for tally in self._tallies),
            cut=sum(tally.cut for tally in self._tallies),
            lost=sum(tally.lost for tally in self._tallies),
            longest_gap_s=round(max(gaps), 1),
            errors=tuple(sorted({e for tally in self._tallies for e in tally.errors})),
        )

    def _keep_asking(self, number: int) -> None:
        turn = number
        tally = self._tallies[number]
        while not self._over.is_set():
            for attempt in range(1, ATTEMPTS + 1):
                begun, error = self._ask(self._addresses[turn % len(self._addresses)], number)
                if error is None:
                    tally.whole_at.append(time.monotonic())
                    break
                tally.errors.add(error)
                turn += 1
                if begun:
                    tally.cut += 1
                    break
                if attempt == ATTEMPTS:
                    tally.lost += 1
                else:
                    tally.sent_again += 1
                time.sleep(_PAUSE_S * attempt)

    def _ask(self, address: tuple[str, int], number: int) -> tuple[bool, str | None]:
        """Return whether an answer began, and the error that ended it."""
        body = {
            "model": "drilled", "stream": True, "max_tokens": _TOKENS, "temperature": 0,
            "messages": [{"role": "user", "content": f"What does sign {number} say?"}],
            "ignore_eos": True,
        }  # fmt: skip
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        begun = False
        connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                return False, f"status {response.status}: {response.read(200).decode()}"
            for line in response:
                text = line.decode().removeprefix("data: ").strip()
                if text == "[DONE]":
                    return True, None
                if not text:
                    continue
                event = json.loads(text)
                if "error" in event:
                    return begun, str(event["error"].get("code"))
                begun = begun or bool(event["choices"][0]["delta"].get("content"))
            return begun, "the stream ended early"
        except (TimeoutError, http.client.HTTPException, OSError) as error:
            return begun, type(error).__name__
        finally:
            connection.close()
