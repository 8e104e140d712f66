import json
import time

import httpx
import pytest
from table_engine import TableEngine
from web_server import Running, serving

from llava_ray.errors import ConfigError
from llava_ray.server.canary import agreement


def test_agreement_is_the_share_before_the_first_difference() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert agreement([], []) == 1.0
    assert agreement([1], []) == 0.0
    assert agreement([7, 8], [7, 8]) == 1.0


def _ask(server: Running, **fields: object) -> str:
    body = {"model": "old", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | fields)
    return answer.text


def _series(server: Running, start: str) -> list[str]:
    text = httpx.get(f"{server.url}/metrics").text
    return [line for line in text.splitlines() if line.startswith(start)]


def _await_outcomes(server: Running, count: float) -> dict[str, float]:
    for _ in range(100):
        lines = _series(server, "llava_ray_canary_answers_total")
        found = {
            line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines
        }
        if sum(found.values()) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def test_an_equal_newcomer_agrees_on_every_request() -> None:
    engines = {"old": TableEngine(), "new": TableEngine()}
    with serving(engines, canary={"model": "new", "share": 1.0}) as running:
        _ask(running)
        _await_outcomes(running, 1)
        assert "[DONE]" in _ask(running, stream=True, temperature=0.7)
        _await_outcomes(running, 2)
        _ask(running, stop=["a"])
        assert _await_outcomes(running, 3) == {"equal": 3.0}
    assert engines["new"].prefills == 3


def test_another_newcomer_is_seen_to_differ_and_clients_do_not_notice() -> None:
    engines = {"old": TableEngine(), "new": TableEngine(letters="xyz")}
    with serving(engines, canary={"model": "new", "share": 1.0}) as running:
        answer = json.loads(_ask(running))["choices"][0]["message"]["content"]
        assert not set("xyz") & set(answer)
        assert _await_outcomes(running, 1) == {"different": 1.0}
        _ask(running, model="new")
        time.sleep(0.2)
        assert engines["new"].prefills == 2, "what asks the newcomer itself is not compared"


def test_a_newcomer_that_sees_otherwise_is_refused() -> None:
    other = TableEngine()
    other.tokens_per_image = 9
    with (
        pytest.raises(ConfigError, match="canary 'new' has tokens_per_image=9"),
        serving({"old": TableEngine(), "new": other}, canary={"model": "new"}),
    ):
        pass
