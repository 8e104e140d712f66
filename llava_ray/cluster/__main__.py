"""Run a cluster YAML's head on this machine: up, down, status, env, exit-code."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from llava_ray.cluster.local import down, exit_code_of_job, processes_of, running, up
from llava_ray.errors import LlavaRayError, ResourceError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; an expected failure is one line on stderr and exit code 2."""
    from llava_ray.cli import fail

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
        raise ResourceError(
            f"the cluster of {args.yaml} does not run: 'python -m llava_ray.cluster up {args.yaml}'"
        )
    # A token in the environment would win over the file.
    print("unset RAY_AUTH_TOKEN")
    for name, value in head.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def _exit_code(args: argparse.Namespace) -> None:
    print(exit_code_of_job(args.job))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_ray.cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, text in (
        ("up", _up, "start the head, or find the one that runs"),
        ("down", _down, "stop the head and all that it started"),
        ("status", _status, "say whether the head runs"),
        ("env", _env, "print the exports that clients need"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("yaml", type=Path, help="such as cluster/local.yaml")
        command.set_defaults(run=run)
    command = commands.add_parser("exit-code", help="print the exit code of a finished job")
    command.add_argument("job", help="its submission id")
    command.set_defaults(run=_exit_code)
    return parser


if __name__ == "__main__":
    main()
