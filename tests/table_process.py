"""The program of a table engine's process, which does what its first argument says."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from table_engine import TableEngine

from llava_ray.errors import VariantError
from llava_ray.inference.process.child import serve_engine
from llava_ray.resources.crash import crash_recorded


class Scripted(TableEngine):
    """Does what is asked for in the middle of its answers, in its first process only."""

    def __init__(self, how: str) -> None:
        super().__init__(slots=2, context=10_000)
        self.how = how

    def decode(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        if len(self.batches) == 20:
            if self.how == "crash":
                signal.raise_signal(signal.SIGSEGV)
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().decode(slots, tokens)


def _open(script: dict[str, str]) -> TableEngine:
    lives = Path(script["lives"])
    number = len(lives.read_text().split()) if lives.exists() else 0
    with lives.open("a") as file:
        file.write(f"{os.getpid()}\n")
    how = script["first"] if number == 0 else script.get("later", "")
    if how == "refuse":
        raise VariantError("no such file")
    if how == "exit":
        os._exit(7)
    return Scripted(how)


if __name__ == "__main__":
    script = json.loads(sys.argv[1])
    with crash_recorded(f"table-{os.getpid()}"):
        serve_engine(lambda: _open(script), socket.socket(fileno=int(sys.argv[2])))
