"""A thousand bodies that were changed at random: refused each, and nothing is left of them."""

import ctypes
import gc
import random

import httpx
import psutil
from hostile import one_of_each
from table_engine import TableEngine
from web_server import serving


def _held_bytes() -> int:
    """Return the process's memory without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_a_thousand_hostile_bodies_never_break_the_server() -> None:
    rng = random.Random(0)
    engine = TableEngine(context=4096)
    statuses: dict[int, int] = {}
    with (
        serving({"tiny": engine}) as running,
        httpx.Client(timeout=30, headers={"Content-Type": "application/json"}) as client,
    ):
        url = f"{running.url}/v1/chat/completions"

        def send(rounds: int) -> None:
            for _ in range(rounds):
                for body in one_of_each(rng, "tiny"):
                    answer = client.post(url, content=body)
                    assert answer.status_code < 500, answer.text
                    statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                    if answer.status_code >= 400:
                        assert answer.json()["error"]["message"]

        send(5)
        before = _held_bytes()
        send(12)
        grown = _held_bytes() - before
        assert running.endpoint._under_way == 0
    assert engine.held == {}
    assert statuses[400] > 500, statuses
    assert grown < 20e6, f"{grown / 1e6:.1f} MB more than before"
