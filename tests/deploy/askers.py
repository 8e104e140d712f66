"""Clients that keep asking for streams or upload slowly, and the processes that answer them."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import openai
from openai import OpenAI


def replica_pids() -> list[int]:
    return _pids("ServeReplica:llava_ray:replica")


def engine_pids() -> list[int]:
    return _pids("llava_ray.server.loading")


def _pids(name: str) -> list[int]:
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * (name in " ".join(process.cmdline()))
    return sorted(found)


@dataclass(frozen=True)
class Asked:
    """One request: when it was sent and ended, and how."""

    sent: float
    ended: float
    how: str
    """`whole`, `cut` (an error event after the first token), `failed` (an HTTP status), `broken`
    (the connection ended) or `unreachable`."""
    words: str = ""


class Asker(threading.Thread):
    """Ask for streams until told to stop; remember how each ended."""

    def __init__(self, url: str, over: threading.Event, number: int) -> None:
        super().__init__()
        self.url, self.over, self.number = url, over, number
        self.asked: list[Asked] = []

    def run(self) -> None:
        with OpenAI(base_url=self.url, api_key="unused", max_retries=0, timeout=90) as client:
            while not self.over.is_set():
                sent = time.monotonic()
                how, words = self._ask(client)
                self.asked.append(Asked(sent, time.monotonic(), how, words))
                if how == "unreachable":
                    time.sleep(0.1)

    def _ask(self, client: OpenAI) -> tuple[str, str]:
        begun = False
        try:
            stream = client.chat.completions.create(
                model="none-fp32",
                messages=[{"role": "user", "content": f"What is sign {self.number}?"}],
                max_tokens=40,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            reason = None
            for chunk in stream:
                begun = begun or bool(chunk.choices[0].delta.content)
                reason = chunk.choices[0].finish_reason
            return ("whole", "") if reason == "length" else ("broken", f"ended with {reason}")
        except openai.APIStatusError as error:
            return "failed", f"{error.status_code} {error.message}"
        except openai.APIConnectionError as error:
            refused = type(error.__cause__).__name__ == "ConnectError"
            return ("unreachable" if refused else "broken"), repr(error.__cause__)
        except openai.APIError as error:
            # The client raises this for an error event.
            return ("cut" if begun and error.code == "engine_lost" else "broken"), str(error)
        except httpx.HTTPError as error:
            return "broken", repr(error)


@contextmanager
def asking(url: str, count: int) -> Iterator[list[Asker]]:
    """Have some clients ask until the block ends."""
    over = threading.Event()
    askers = [Asker(url, over, number) for number in range(count)]
    for asker in askers:
        asker.start()
    try:
        yield askers
    finally:
        over.set()
        for asker in askers:
            asker.join()


@contextmanager
def uploading_slowly(url: str, count: int) -> Iterator[None]:
    """Have some clients send a body, a byte a second, until the block ends."""
    parts, over = urlsplit(f"{url}/chat/completions"), threading.Event()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    )
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
            for _ in range(count)
        ]

        def send() -> None:
            part = head.encode()
            while not over.is_set():
                for connection in connections:
                    connection.sendall(part)
                part = b" "
                over.wait(1)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def ways(askers: list[Asker]) -> dict[str, int]:
    """Return how many requests ended in which way."""
    return dict(Counter(asked.how for asker in askers for asked in asker.asked))
