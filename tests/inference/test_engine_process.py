"""An engine's process that crashes, hangs, stops or refuses, and one whose parent is killed."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pytest
from pictures import square
from table_engine import TableEngine

from llava_ray.errors import ResourceError
from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import generate_text
from llava_ray.inference.process.client import EngineLost, EngineProcess
from llava_ray.inference.request_errors import BadRequest, DeadlineExceeded, Unavailable
from llava_ray.inference.sampling import SamplingParams, Step

T = TypeVar("T")


def _command(lives: Path, first: str = "", later: str = "") -> tuple[str, ...]:
    script = {"lives": str(lives), "first": first, "later": later}
    return "table", "table_process", json.dumps(script)


def _run(
    command: tuple[str, ...],
    work: Callable[[EngineProcess], Awaitable[T]],
    step_timeout_s: float = 60,
) -> T:
    async def main() -> T:
        engine = EngineProcess(*command, step_timeout_s=step_timeout_s)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def _prompt(last: int = 0) -> Prompt:
    return Prompt((1, 100, 100 + last), (square(np.full((8, 8, 3), last, np.uint8)),))


def _pid(engine: EngineProcess) -> int:
    assert engine._life is not None
    return engine._life.process.pid


async def _steps(
    engine: EngineProcess, prompt: Prompt, sampling: SamplingParams, timeout_s: float = 60
) -> list[Step]:
    stream = engine.stream(prompt, sampling, timeout_s)
    return [step async for chunk in stream for step in chunk.steps]


def test_answers_are_those_of_the_engine_itself(tmp_path: Path) -> None:
    wanted = [
        SamplingParams(max_tokens=9, temperature=i % 2, seed=i, top_logprobs=i, stop=("x",))
        for i in range(5)
    ]
    alone = [generate_text(TableEngine(), _prompt(i), s) for i, s in enumerate(wanted)]

    async def work(engine: EngineProcess) -> list[list[Step]]:
        return await asyncio.gather(*(_steps(engine, _prompt(i), s) for i, s in enumerate(wanted)))

    steps = _run(_command(tmp_path / "lives"), work)
    assert [tuple(s.token_id for s in each) for each in steps] == [a.token_ids for a in alone]
    assert [len(each[0].top_logprobs) for each in steps] == list(range(5))


def test_an_engines_refusal_of_a_prompt_comes_through(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="10001 tokens") as caught:
        _run(
            _command(tmp_path / "lives"),
            lambda engine: _steps(engine, Prompt((100,) * 10_001), SamplingParams()),
        )
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("how", "step_timeout_s", "line"),
    [
        ("crash", 60, "died by SIGSEGV in decode"),
        ("stop", 60, "no sign of life for 5 s"),
        ("hang", 2, "no step within serve.step_timeout_s=2 s"),
    ],
)
def test_what_had_not_begun_goes_to_the_next_process(
    how: str, step_timeout_s: float, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endless = SamplingParams(max_tokens=9000, ignore_eos=True)

    async def work(engine: EngineProcess) -> list[object]:
        begun = [asyncio.create_task(_steps(engine, _prompt(i), endless)) for i in range(2)]
        await asyncio.sleep(0.05)
        # Both slots are taken: these wait in the process that is lost.
        waiting = [
            asyncio.create_task(_steps(engine, _prompt(i), SamplingParams(max_tokens=30)))
            for i in range(6)
        ]
        return await asyncio.gather(*begun, *waiting, return_exceptions=True)

    with caplog.at_level(logging.ERROR):
        results = _run(_command(tmp_path / "lives", first=how), work, step_timeout_s)
    assert [type(r) for r in results] == [EngineLost] * 2 + [list] * 6, results
    assert line in caplog.text
    assert len((tmp_path / "lives").read_text().split()) == 2


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    async def work(_: EngineProcess) -> None:
        raise AssertionError

    with pytest.raises(ResourceError, match="^no such file$"):
        _run(_command(tmp_path / "a", first="refuse"), work)
    with pytest.raises(ResourceError, match="table: its process ended with exit code 7"):
        _run(_command(tmp_path / "b", first="exit"), work)


def test_an_engine_that_does_not_come_back_is_broken(tmp_path: Path) -> None:
    async def work(engine: EngineProcess) -> None:
        engine.check()
        os.kill(_pid(engine), signal.SIGKILL)
        waiting = asyncio.create_task(_steps(engine, _prompt(), SamplingParams()))
        await asyncio.sleep(0.2)
        with pytest.raises(Unavailable, match="being started again"):
            engine.check()
        engine.check_alive()
        with pytest.raises(Unavailable, match="exit code 7"):
            await waiting
        with pytest.raises(Unavailable, match="exit code 7"):
            engine.check_alive()

    _run(_command(tmp_path / "lives", later="exit"), work)
    assert len((tmp_path / "lives").read_text().split()) == 4


def test_a_request_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    async def work(engine: EngineProcess) -> None:
        os.kill(_pid(engine), signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await _steps(engine, _prompt(), SamplingParams(), timeout_s=1)
        assert time.monotonic() - start < 2

    _run(_command(tmp_path / "lives"), work)


def test_a_late_answer_frees_its_slot(tmp_path: Path) -> None:
    endless = SamplingParams(max_tokens=9000, ignore_eos=True)

    async def work(engine: EngineProcess) -> list[object]:
        calls = (_steps(engine, _prompt(), endless, timeout_s=0.5) for _ in range(3))
        late = await asyncio.gather(*calls, return_exceptions=True)
        return [*late, await _steps(engine, _prompt(1), SamplingParams(max_tokens=2), 5)]

    *late, last = _run(_command(tmp_path / "lives"), work)
    assert [type(each) for each in late] == [DeadlineExceeded] * 3
    assert len(last) == 2


def test_leaving_an_answer_frees_its_slot(tmp_path: Path) -> None:
    endless = SamplingParams(max_tokens=9000, ignore_eos=True)

    async def work(engine: EngineProcess) -> list[Step]:
        for _ in range(5):
            stream = engine.stream(_prompt(), endless, 60)
            await anext(stream)
            await stream.aclose()
        return await _steps(engine, _prompt(1), SamplingParams(max_tokens=2), timeout_s=5)

    assert len(_run(_command(tmp_path / "lives"), work)) == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_the_process_ends_with_its_parent(stopped: bool, tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lines = (
        "import asyncio, json",
        "from llava_ray.inference.process.client import EngineProcess",
        "async def main():",
        f"    script = json.dumps({{'lives': {str(lives)!r}, 'first': ''}})",
        "    engine = EngineProcess('t', 'table_process', script, step_timeout_s=9)",
        "    await engine.start()",
        "    print('started', flush=True)",
        "    await asyncio.sleep(1000)",
        "asyncio.run(main())",
    )
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        child = psutil.Process(int(lives.read_text()))
        if stopped:
            child.suspend()
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=5)
    assert gone


def test_the_process_does_not_import_ray(tmp_path: Path) -> None:
    async def work(engine: EngineProcess) -> str:
        return Path(f"/proc/{_pid(engine)}/maps").read_text()

    assert "_raylet" not in _run(_command(tmp_path / "lives"), work)
