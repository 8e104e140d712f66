"""The commands up, down, status and env: a cluster YAML's head on this machine."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llava_ray.cluster.local import down, processes_of, running, up
from llava_ray.console import errors_in_one_line
from llava_ray.errors import ResourceError
from llava_ray.shipped import shipped

COMMANDS = {
    "up": "start Ray on this machine, or find what runs",
    "down": "stop it, and all that it started",
    "status": "say whether it runs",
    "env": "print the exports that clients of it need",
    "submit": "send a job to a cluster, unless it is too large to travel or carries secrets",
}


def main(argv: Sequence[str]) -> None:
    """Run one of COMMANDS; an expected failure is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog=f"llava-ray {argv[0]}", description=COMMANDS[argv[0]])
    parser.add_argument(
        "yaml", type=Path, nargs="?", default=shipped("cluster/local.yaml"),
        help="a cluster YAML whose head is this machine; default: %(default)s",
    )  # fmt: skip
    with errors_in_one_line():
        if argv[0] == "submit":
            _submit(argv[1:])
        path = parser.parse_args(argv[1:]).yaml
        if argv[0] == "up":
            head = up(path)
            print(f"Ray runs at {head.address}, jobs go to {head.dashboard}")
        elif argv[0] == "down":
            print(f"{down(path)} processes stopped")
        elif (found := running(path)) is None:
            if argv[0] == "env":
                raise ResourceError(f"the cluster of {path} does not run: 'llava-ray up {path}'")
            print("not running")
        elif argv[0] == "status":
            count = len(processes_of(found.cluster_id))
            print(f"running at {found.address}, jobs go to {found.dashboard}, {count} processes")
        else:
            # A token in the environment would win over the file.
            print("unset RAY_AUTH_TOKEN")
            for name, value in found.environment().items():
                print(f"export {name}={shlex.quote(value)}")


def _submit(argv: Sequence[str]) -> NoReturn:
    """Become `ray job submit`, having looked at what would travel."""
    parser = argparse.ArgumentParser(
        prog="llava-ray submit", description=COMMANDS["submit"],
        epilog="example: %(prog)s -- llava-ray pipeline --config my.yaml",
    )  # fmt: skip
    parser.add_argument("--working-dir", type=Path, default=Path.cwd(), help="what travels")
    parser.add_argument("--runtime-env", type=Path, default=shipped("jobs/runtime_env.yaml"))
    parser.add_argument("entrypoint", nargs="+", help="the job's command, after --")
    given = parser.parse_args(argv)
    # Imported here: the other commands need none of what it knows.
    from llava_ray.doctor import check_job

    check_job(given.working_dir.absolute(), given.runtime_env)
    ray = Path(sys.executable).with_name("ray")
    travels = ["--working-dir", given.working_dir, "--runtime-env", given.runtime_env]
    os.execv(ray, [str(part) for part in (ray, "job", "submit", *travels, "--", *given.entrypoint)])
