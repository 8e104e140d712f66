"""Clients that keep asking for streams, and the processes that answer them."""

import threading

import openai
from openai import OpenAI


def replica_pids() -> list[int]:
    return _pids("ServeReplica:llava_ray:replica")


def engine_pids() -> list[int]:
    return _pids("llava_ray.server.loading")


def _pids(name: str) -> list[int]:
    import psutil

    return sorted(
        process.pid
        for process in psutil.Process().children(recursive=True)
        if name in " ".join(process.cmdline())
    )


class Asker(threading.Thread):
    """Ask for streams until told to stop; remember how each ended."""

    def __init__(self, url: str, over: threading.Event, number: int) -> None:
        super().__init__()
        self.url, self.over, self.number = url, over, number
        self.whole = 0
        self.cut: list[str] = []
        self.lost: list[BaseException] = []

    def run(self) -> None:
        with OpenAI(base_url=self.url, api_key="unused", max_retries=0) as client:
            while not self.over.is_set():
                self._ask(client)

    def _ask(self, client: OpenAI) -> None:
        begun = False
        try:
            stream = client.chat.completions.create(
                model="none-fp32",
                messages=[{"role": "user", "content": f"What is sign {self.number}?"}],
                max_tokens=40,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                begun = begun or bool(chunk.choices[0].delta.content)
                reason = chunk.choices[0].finish_reason
            assert reason == "length"
            self.whole += 1
        except openai.APIStatusError as error:
            self.lost.append(error)
        except openai.APIError as error:
            # The client raises this for an error event; a broken connection is another class.
            if begun and type(error) is openai.APIError and error.code == "engine_lost":
                self.cut.append(str(error))
            else:
                self.lost.append(error)
        except Exception as error:
            self.lost.append(error)
