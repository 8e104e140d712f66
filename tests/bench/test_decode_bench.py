"""How a wave of requests is timed, on an engine without a model."""

import pytest
from table_engine import TableEngine

from llava_ray.bench.decode import NEW_TOKENS, Wave, _speeds, _wave
from llava_ray.inference.engine import Prompt
from llava_ray.inference.scheduler import Scheduler


def test_requests_that_wait_count_too() -> None:
    engine = TableEngine(slots=4)
    scheduler = Scheduler(engine)
    scheduler.start()
    wave = _wave(scheduler, [Prompt((1, 100, 100 + last)) for last in range(6)])
    scheduler.close()
    assert engine.prefills == 6
    assert 0 < wave.first_s <= wave.last_first_s <= wave.end_s
    assert sum(engine.batches) == 6 * (NEW_TOKENS - 1)


def test_a_request_that_fails_fails_the_row() -> None:
    scheduler = Scheduler(TableEngine())
    scheduler.start()
    with pytest.raises(RuntimeError, match="1 of 2 requests failed"):
        _wave(scheduler, [Prompt((1,)), Prompt((1,) * 999)])
    scheduler.close()


def test_prefill_counts_in_the_total_alone() -> None:
    speeds = _speeds(2, [Wave(1.0, 2.0, 4.0)])
    assert speeds["tokens_per_s"] == 2 * (NEW_TOKENS - 1) / 2
    assert speeds["total_tokens_per_s"] == 2 * NEW_TOKENS / 4
    assert (speeds["first_token_ms"], speeds["last_first_token_ms"]) == (1000, 2000)
