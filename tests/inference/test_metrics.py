"""What operators read: every series that a dashboard needs, with the right numbers in it."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families
from table_engine import TableEngine
from web_server import Running, serving

from llava_ray.inference.metrics import merge_expositions


def _series(server: Running) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("le", "+Inf") == "+Inf":
                outcome = sample.labels.get("outcome")
                found[f"{sample.name}/{outcome}" if outcome else sample.name] = sample.value
    return found


def test_requests_tokens_times_queue_and_memory_are_counted() -> None:
    with serving({"tiny": TableEngine()}) as running:
        before = _series(running)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
        prompt_tokens = 0
        for _ in range(3):
            answer = httpx.post(f"{running.url}/v1/chat/completions", json=body).json()
            prompt_tokens += answer["usage"]["prompt_tokens"]
        after = _series(running)
    assert before["llava_ray_generated_tokens_total"] == 0
    assert after["llava_ray_generated_tokens_total"] == 27
    assert after["llava_ray_prompt_tokens_total"] == prompt_tokens
    assert after["llava_ray_time_to_first_token_seconds_count"] == 3
    assert after["llava_ray_time_per_token_seconds_count"] == 24
    assert 0 < after["llava_ray_time_to_first_token_seconds_sum"] < 3
    assert after["llava_ray_requests_total/length"] == 3
    assert after["llava_ray_queue_requests"] == after["llava_ray_active_requests"] == 0
    assert after["llava_ray_memory_bytes"] > 1e6


def test_replicas_are_joined_under_one_head() -> None:
    each = '# HELP x_total A count\n# TYPE x_total counter\nx_total{{replica="{}"}} 1.0\n'
    merged = merge_expositions([each.format("a").encode(), each.format("b").encode()]).decode()
    assert merged.splitlines() == [
        "# HELP x_total A count", "# TYPE x_total counter",
        'x_total{replica="a"} 1.0', 'x_total{replica="b"} 1.0',
    ]  # fmt: skip


def test_a_waiting_request_shows_in_the_queue() -> None:
    endless = TableEngine(slots=1, context=1_000_000)
    endless.eos_token_id = -1
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with (
        serving({"tiny": endless}, max_new_tokens=900_000, context=1_000_000) as running,
        httpx.Client() as client,
        client.stream("POST", f"{running.url}/v1/chat/completions", json=body) as first,
        ThreadPoolExecutor(1) as pool,
    ):
        # Kept, or the response would be closed with it.
        lines = first.iter_lines()
        next(lines)
        assert _series(running)["llava_ray_queue_requests"] == 0
        second = pool.submit(_ask_in_vain, running)
        found = _series(running)
        while found["llava_ray_queue_requests"] < 1 and not second.done():
            found = _series(running)
        assert found["llava_ray_queue_requests"] == found["llava_ray_active_requests"] == 1


def _ask_in_vain(running: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=2)
