"""The whole line on this machine: starts Ray here, submits the pipeline as a job and follows it."""

import asyncio
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray import preflight
from llava_ray.cluster.local import up
from llava_ray.config.run import load_config
from llava_ray.errors import ResourceError
from llava_ray.shipped import shipped

_HELP = """usage: llava-ray quickstart [--config FILE] [--dry-run] [section.key=value ...]

Captions in, a served quantized LLaVA out, on this machine. Run it again to go on.
examples:
  llava-ray quickstart
  llava-ray quickstart data.source=captions.jsonl
  llava-ray pipeline --help"""

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def run(argv: Sequence[str]) -> int:
    """Run the pipeline with overrides, or with `--config FILE`; return the job's exit code.

    The job goes on where this is interrupted; with the same arguments in the same folder it is
    followed again. Raises ConfigError for a config that is not valid, ResourceError where Ray does
    not start.
    """
    from llava_ray.cli import argument_parser

    if {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0
    if "--config" not in argv:
        argv = ["--config", str(shipped("jobs/configs/quickstart.yaml")), *argv]
    arguments = argument_parser(None).parse_intermixed_args(argv)
    preflight.check(load_config(arguments.config, arguments.overrides))
    pipeline = [sys.executable, str(shipped("jobs/pipeline.py")), *argv]
    if arguments.dry_run:
        return subprocess.call(pipeline)
    os.environ["RAY_AUTH_MODE"] = "token"  # Ray reads it when it is imported.
    head = up(shipped("cluster/local.yaml"))
    print(f"Ray runs at {head.address}, jobs go to {head.dashboard}", flush=True)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # It would win over the cluster's own token.
    os.environ.update(head.environment())
    from ray.job_submission import JobSubmissionClient

    # Paths among the arguments are relative to this folder.
    entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(pipeline)}"
    client = JobSubmissionClient(head.dashboard)
    job = _unfinished(client, entrypoint)
    if job is not None:
        print(f"job {job} does this already; this follows it", flush=True)
    else:
        job = client.submit_job(
            submission_id=f"pipeline-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            entrypoint=entrypoint,
            # The address keeps Ray's own helpers from looking for another cluster.
            runtime_env={"env_vars": {"PYTHONUNBUFFERED": "1", "RAY_ADDRESS": head.address}},
        )
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        program = Path(sys.executable).parent
        print(
            f"\njob {job} goes on; the same command follows it again, and this ends it:\n"
            f'eval "$({program}/llava-ray env)"; {program}/ray job stop {job}',
            file=sys.stderr,
        )
        return 130
    return exit_code_of(client, job)


def _unfinished(client: "JobSubmissionClient", entrypoint: str) -> str | None:
    """Return the job with that entrypoint that waits or runs, if there is one."""
    jobs = (job for job in client.list_jobs() if job.entrypoint == entrypoint)
    return next((job.submission_id for job in jobs if not job.status.is_terminal()), None)


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
