"""The quickstart's job is submitted once; the same command follows it."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from llava_ray.quickstart import _unfinished, run


def client_of(*jobs: tuple[str, str, JobStatus]) -> Any:
    details = [
        SimpleNamespace(submission_id=name, entrypoint=entrypoint, status=status)
        for name, entrypoint, status in jobs
    ]
    return SimpleNamespace(list_jobs=lambda: details)


def test_only_a_job_of_the_same_command_that_has_not_ended_is_followed() -> None:
    client = client_of(
        ("a", "this", JobStatus.STOPPED),
        ("b", "that", JobStatus.RUNNING),
        ("c", "this", JobStatus.FAILED),
        ("d", "this", JobStatus.PENDING),
    )
    assert _unfinished(client, "this") == "d"
    assert _unfinished(client, "that") == "b"
    assert _unfinished(client_of(("a", "this", JobStatus.SUCCEEDED)), "this") is None


def test_help_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "usage: llava-ray quickstart" in capsys.readouterr().out
