"""The commands up, down, status and env: a cluster YAML's head on this machine."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from llava_ray.cluster.local import down, processes_of, running, up
from llava_ray.console import fail
from llava_ray.errors import LlavaRayError, ResourceError
from llava_ray.shipped import shipped

COMMANDS = {
    "up": "start Ray on this machine, or find what runs",
    "down": "stop it, and all that it started",
    "status": "say whether it runs",
    "env": "print the exports that clients of it need",
}


def main(argv: Sequence[str]) -> None:
    """Run one of COMMANDS; an expected failure is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog=f"llava-ray {argv[0]}", description=COMMANDS[argv[0]])
    parser.add_argument(
        "yaml", type=Path, nargs="?", default=shipped("cluster/local.yaml"),
        help="a cluster YAML whose head is this machine; default: %(default)s",
    )  # fmt: skip
    path = parser.parse_args(argv[1:]).yaml
    try:
        {"up": _up, "down": _down, "status": _status, "env": _env}[argv[0]](path)
    except LlavaRayError as error:
        fail(error)


def _up(path: Path) -> None:
    head = up(path)
    print(f"Ray runs at {head.address}, jobs go to {head.dashboard}")


def _down(path: Path) -> None:
    print(f"{down(path)} processes stopped")


def _status(path: Path) -> None:
    head = running(path)
    if head is None:
        print("not running")
        return
    processes = len(processes_of(head.cluster_id))
    print(f"running at {head.address}, jobs go to {head.dashboard}, {processes} processes")


def _env(path: Path) -> None:
    head = running(path)
    if head is None:
        raise ResourceError(f"the cluster of {path} does not run: 'llava-ray up {path}'")
    # A token in the environment would win over the file.
    print("unset RAY_AUTH_TOKEN")
    for name, value in head.environment().items():
        print(f"export {name}={shlex.quote(value)}")
