"""The measurement of what serving adds, on an engine of no cost."""

import json

import pytest
from PIL import Image
from table_engine import TableEngine
from web_server import data_url, serving

from llava_ray.bench.serving import Timeline, closed_loop, compare, drive, summarize
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.request_errors import BadRequest
from llava_ray.inference.scheduler import Scheduler


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
    scheduler = Scheduler(engine)
    scheduler.start()
    try:
        done = closed_loop(scheduler, prompts, clients=3, tokens=5)
    finally:
        scheduler.close()
    assert len(done) == 12 and all(timeline.tokens == 5 for timeline in done)
    assert engine.prefills == 12 and max(engine.batches) == 3
    assert engine.held == {}
    assert all(t.sent <= t.first <= t.last for t in done)


def test_a_refused_prompt_ends_the_measurement() -> None:
    engine = TableEngine(context=4)
    scheduler = Scheduler(engine)
    scheduler.start()
    try:
        with pytest.raises(BadRequest, match="context holds 4"):
            closed_loop(scheduler, [make_prompt(engine, "What?")], clients=1, tokens=5)
    finally:
        scheduler.close()


def test_the_load_generator_times_every_request() -> None:
    engine = TableEngine()
    with serving({"tiny": engine}) as running:
        done = drive(running.url, [_body()] * 6, clients=2, tokens=12)
        assert len(done) == 6 and all(t.sent < t.first <= t.last for t in done)
        assert engine.prefills == 6
        with pytest.raises(RuntimeError, match="gpt-9"):
            drive(running.url, [_body(model="gpt-9")], clients=1, tokens=12)
        with pytest.raises(RuntimeError, match="gave no 12 tokens"):
            drive(running.url, [_body(max_tokens=3)], clients=1, tokens=12)


def test_what_is_added_is_the_median_of_the_rounds_differences() -> None:
    bare = [Timeline(0.0, 0.1, 1.1, 11), Timeline(0.0, 0.3, 1.5, 11)]
    slow = [Timeline(0.0, 0.106, 1.109, 11), Timeline(0.0, 0.306, 1.509, 11)]
    found = compare([bare] * 3, [slow, [Timeline(0.0, 9.0, 99.0, 11)] * 2, slow])
    assert found["added_first_token_ms"] == pytest.approx(6)
    assert found["added_per_token_ms"] == pytest.approx(0.3)
    assert found["throughput_share"] == pytest.approx(1.5 / 1.509)
    assert found["bare"] == pytest.approx(
        {
            "first_token_p50_ms": 200,
            "first_token_p99_ms": 300,
            "per_token_p50_ms": 110,
            "per_token_p99_ms": 120,
            "tokens_per_s": 22 / 1.5,
        }
    )
    assert found["served"]["first_token_p99_ms"] == pytest.approx(9000)


def test_the_99th_of_a_hundred_requests_is_told() -> None:
    found = summarize([[Timeline(0.0, 0.001 * (i + 1), 1.0, 11) for i in range(101)]])
    assert found["first_token_p99_ms"] == pytest.approx(100)
