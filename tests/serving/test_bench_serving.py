"""The measurement of what serving adds, on an engine of no cost."""

import json

import pytest
from PIL import Image
from table_engine import TableEngine
from web_server import data_url, serving

from llava_ray.serving.bench_serving import closed_loop, compare, summarize
from llava_ray.serving.load import Timeline, drive
from llava_ray.serving.prompts import make_prompt


def _body(**changes: object) -> bytes:
    image = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (9, 9), "red"))}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body | changes).encode()


def test_the_bare_engine_answers_all_clients_in_closed_loops() -> None:
    engine = TableEngine(slots=4)
    prompts = [make_prompt(engine, f"What is {i}?") for i in range(12)]
    done = closed_loop(engine, prompts, clients=3, tokens=5)
    assert len(done) == 12 and all(timeline.tokens == 5 for timeline in done)
    assert engine.prefills == 12 and max(engine.batches) == 3
    assert engine.held == {}
    assert all(t.sent <= t.first <= t.last for t in done)


def test_the_load_generator_times_every_request() -> None:
    engine = TableEngine()
    with serving({"tiny": engine}) as running:
        port = int(running.url.rpartition(":")[2])
        done = drive("127.0.0.1", port, [_body()] * 6, clients=2, tokens=12)
        assert len(done) == 6 and all(t.sent < t.first <= t.last for t in done)
        assert engine.prefills == 6
        with pytest.raises(RuntimeError, match="gpt-9"):
            drive("127.0.0.1", port, [_body(model="gpt-9")], clients=1, tokens=12)
        with pytest.raises(RuntimeError, match="gave no 12 tokens"):
            drive("127.0.0.1", port, [_body(max_tokens=3)], clients=1, tokens=12)


def test_what_is_added_is_the_median_of_the_rounds_differences() -> None:
    bare = summarize([Timeline(0.0, 0.1, 1.1, 11), Timeline(0.0, 0.3, 1.5, 11)])
    assert bare == pytest.approx(
        {"first_token_ms": 200, "per_token_ms": 110, "tokens_per_s": 22 / 1.5}
    )
    served = {"first_token_ms": 206.0, "per_token_ms": 110.3, "tokens_per_s": 14.0}
    found = compare([bare, bare, bare], [served, served | {"first_token_ms": 999.0}, served])
    assert found["added_first_token_ms"] == pytest.approx(6)
    assert found["added_per_token_ms"] == pytest.approx(0.3)
    assert found["goals_met"] == {"first_token": True, "per_token": False, "throughput": True}
