"""The commands up, down, status and env: a cluster YAML's head on this machine."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from llava_ray.cluster.local import down, processes_of, running, up
from llava_ray.console import fail
from llava_ray.errors import LlavaRayError, ResourceError
from llava_ray.shipped import shipped


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; an expected failure is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except LlavaRayError as error:
        fail(error)


def _up(args: argparse.Namespace) -> None:
    head = up(args.yaml)
    print(f"Ray runs at {head.address}, jobs go to {head.dashboard}")


def _down(args: argparse.Namespace) -> None:
    print(f"{down(args.yaml)} processes stopped")


def _status(args: argparse.Namespace) -> None:
    head = running(args.yaml)
    if head is None:
        print("not running")
        return
    processes = len(processes_of(head.cluster_id))
    print(f"running at {head.address}, jobs go to {head.dashboard}, {processes} processes")


def _env(args: argparse.Namespace) -> None:
    head = running(args.yaml)
    if head is None:
        raise ResourceError(f"the cluster of {args.yaml} does not run: 'llava-ray up {args.yaml}'")
    # A token in the environment would win over the file.
    print("unset RAY_AUTH_TOKEN")
    for name, value in head.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, text in (
        ("up", _up, "start the head, or find the one that runs"),
        ("down", _down, "stop the head and all that it started"),
        ("status", _status, "say whether the head runs"),
        ("env", _env, "print the exports that clients need"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "yaml", type=Path, nargs="?", default=shipped("cluster/local.yaml"),
            help="a cluster YAML whose head is this machine; default: %(default)s",
        )  # fmt: skip
        command.set_defaults(run=run)
    return parser
