import json
import time
from collections import Counter

import httpx
import pytest
from table_engine import TableEngine
from web_server import Running, serving

from llava_ray.errors import ConfigError
from llava_ray.models.family import VisionShape
from llava_ray.models.llava import Llava
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


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the comparisons' counter was told."""
    told: Counter[str] = Counter()

    def inc(counter: object, value: float, tags: dict[str, str]) -> None:
        if "outcome" in tags and tags["model"] == "new":
            told[tags["outcome"]] += int(value)

    monkeypatch.setattr("ray.serve.metrics.Counter.inc", inc)
    return told


def _await_outcomes(outcomes: Counter[str], *kinds: str) -> None:
    for _ in range(100):
        if outcomes == Counter(kinds):
            return
        time.sleep(0.05)
    raise AssertionError(outcomes)


def test_an_equal_newcomer_agrees_on_every_request(outcomes: Counter[str]) -> None:
    engines = {"old": TableEngine(), "new": TableEngine()}
    with serving(engines, canary="new", canary_share=1.0) as running:
        _ask(running)
        _await_outcomes(outcomes, "equal")
        assert "[DONE]" in _ask(running, stream=True, temperature=0.7)
        _await_outcomes(outcomes, *["equal"] * 2)
        _ask(running, stop=["a"])
        _await_outcomes(outcomes, *["equal"] * 3)
    assert engines["new"].prefills == 3


def test_another_newcomer_is_seen_to_differ_and_clients_do_not_notice(
    outcomes: Counter[str],
) -> None:
    engines = {"old": TableEngine(), "new": TableEngine(letters="xyz")}
    with serving(engines, canary="new", canary_share=1.0) as running:
        answer = json.loads(_ask(running))["choices"][0]["message"]["content"]
        assert not set("xyz") & set(answer)
        _await_outcomes(outcomes, "different")
        _ask(running, model="new")
        time.sleep(0.2)
        assert engines["new"].prefills == 2, "what asks the newcomer itself is not compared"


def test_a_newcomer_that_sees_otherwise_is_refused() -> None:
    other = TableEngine()
    other.family = Llava(VisionShape(8, 9, other.family.vision.image_token_id))
    with (
        pytest.raises(
            ConfigError, match="canary 'new' has family=.*tokens=9.*'old' has .*tokens=4"
        ),
        serving({"old": TableEngine(), "new": other}, canary="new"),
    ):
        pass
