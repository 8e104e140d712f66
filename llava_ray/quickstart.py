"""The whole line on this machine: starts Ray here, submits the pipeline as a job and follows it."""

import asyncio
import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.cluster.local import up
from llava_ray.errors import ResourceError
from llava_ray.shipped import shipped

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def run(argv: Sequence[str]) -> int:
    """Run the pipeline with overrides, or with `--config FILE`; return the job's exit code.

    The job goes on where this is interrupted. Raises ConfigError for a config that is not valid,
    ResourceError where Ray does not start.
    """
    if "--config" not in argv:
        argv = ["--config", str(shipped("jobs/configs/quickstart.yaml")), *argv]
    os.environ["RAY_AUTH_MODE"] = "token"  # Ray reads it when it is imported.
    head = up(shipped("cluster/local.yaml"))
    print(f"Ray runs at {head.address}, jobs go to {head.dashboard}", flush=True)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # It would win over the cluster's own token.
    os.environ.update(head.environment())
    from ray.job_submission import JobSubmissionClient

    pipeline = [sys.executable, str(shipped("jobs/pipeline.py")), *argv]
    client = JobSubmissionClient(head.dashboard)
    job = client.submit_job(
        submission_id=f"pipeline-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
        # Paths among the arguments are relative to this folder.
        entrypoint=f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(pipeline)}",
        runtime_env={"env_vars": {"PYTHONUNBUFFERED": "1"}},
    )
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(
            f"\njob {job} goes on: 'ray job logs -f {job}' shows it, 'ray job stop {job}' ends it",
            file=sys.stderr,
        )
        return 130
    return exit_code_of(client, job)


async def _follow(client: "JobSubmissionClient", job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def exit_code_of(client: "JobSubmissionClient", job: str) -> int:
    """Return the exit code of a finished job's driver; 1 where Ray recorded none."""
    try:
        info = client.get_job_info(job)
    except (RuntimeError, ConnectionError) as error:
        raise ResourceError(f"job {job!r}: {str(error).splitlines()[0]}") from error
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)
