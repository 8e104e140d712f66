"""The console script `llava-ray`, and what every job script shares: arguments and Ray."""

import argparse
import ast
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llava_ray.artifacts.storage import Storage, cache_folder, check_writable
from llava_ray.cluster import commands
from llava_ray.config.run import RunConfig, load_config, to_yaml
from llava_ray.console import errors_in_one_line, fail, set_up_logging
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import find_fleet
from llava_ray.shipped import shipped

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EXAMPLES = """
examples:
  llava-ray quickstart
  llava-ray quickstart data.source=captions.jsonl
  llava-ray pipeline --config my.yaml --dry-run
  llava-ray train --config my.yaml train.learning_rate=1e-4
  llava-ray doctor cluster/aws.yaml --config my.yaml
  llava-ray bench serving --help
"""
_ON_THIS_MACHINE = {
    "quickstart": "the whole line on this machine: captions in, a served quantized LLaVA out",
    **commands.COMMANDS,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command of `llava-ray`; an expected failure is one line and exit code 2."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "bench":
        bench, *rest = rest or ["--help"]
        _run_script("bench", bench, rest)
    elif name == "quickstart":
        from llava_ray.quickstart import run

        with errors_in_one_line():
            sys.exit(run(rest))
    elif name in commands.COMMANDS:
        commands.main([name, *rest])
    else:
        _run_script("", name, rest)


def _run_script(group: str, command: str, arguments: Sequence[str]) -> None:
    """Run a script of jobs/ as if by its path; without one, list those that there are."""
    scripts = {path.stem: path for path in sorted(shipped(f"jobs/{group}").glob("*.py"))}
    name = f"{group} {command}".lstrip()
    if script := scripts.get(command):
        sys.argv = [f"llava-ray {name}", *arguments]
        # Not by runpy, which would put the script's path in the place of the command's name.
        code = compile(script.read_text("utf-8"), str(script), "exec")
        exec(code, {"__name__": "__main__", "__file__": str(script)})
        return
    known = {
        key: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
        for key, path in scripts.items()
    }
    known = known if group else _ON_THIS_MACHINE | known | {"bench": "measure; 'bench' lists what"}
    if command not in ("-h", "--help"):
        near = difflib.get_close_matches(command, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        fail(ConfigError(f"no command {name!r}: {hint}"))
    print(f"usage: llava-ray {group + ' ' if group else ''}COMMAND ...\n")
    print("\n".join(f"  {key:<11}{text}" for key, text in known.items()))
    print(_EXAMPLES)


@errors_in_one_line()
def run_job(
    description: str | None, stage: Callable[[RunConfig], T], argv: Sequence[str] | None = None
) -> T | None:
    """Parse --config and overrides, connect to Ray and run a stage.

    A LlavaRayError ends the process with one line on stderr and exit code 2; `--dry-run` prints
    the merged config and the resources that would be asked for, and returns None.
    """
    parser = argument_parser(description)
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE",
        help="delete what the stage has made, and all made from it, and make it anew",
    )  # fmt: skip
    parser.add_argument(
        "--resume", metavar="ID",
        help="go on with a training that was cut off under other code or libraries",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    set_up_logging()
    overrides = [*args.overrides]
    overrides += [f"storage.force=[{', '.join(args.force)}]"] if args.force else []
    overrides += [f"train.resume_from={args.resume}"] if args.resume else []
    config = load_config(args.config, overrides)
    # Imported here: the stages that they ask know large libraries.
    from llava_ray import preflight, settle

    config = settle.with_node_types(config)
    preflight.check(config)
    if isinstance(config.resources.node_types, tuple):
        fleet = find_fleet(config)
        config = settle.settle(config, fleet)
        for shortage in settle.shortages(config, fleet):
            logger.warning("%s", shortage)
    if args.dry_run:
        from llava_ray.dry_run import describe_requests

        print(to_yaml(config) + describe_requests(config))
        return None
    storage = Storage(config.storage.uri)
    if storage.is_local:
        check_writable(Path(storage.root), f"storage.uri {config.storage.uri!r}")
    storage.check()
    check_writable(cache_folder(), "LLAVA_RAY_CACHE")
    connect()
    return stage(settle.settle(config, find_fleet(config, idle=True)))


def connect() -> None:
    """Join the cluster of $RAY_ADDRESS or of the job; without one, start Ray in this process.

    Raises ResourceError when the address does not answer or refuses the token.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(
            # Not "auto", which would join whatever was started last, alive or not.
            address=os.environ.get("RAY_ADDRESS") or "local",
            runtime_env={"worker_process_setup_hook": "llava_ray.console.set_up_logging"},
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "a new local one")
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"no Ray cluster at {address}: {reason}; start one with 'llava-ray up'"
        ) from error


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a job's arguments; its `parse_intermixed_args` takes any order."""
    example = "example: %(prog)s --config jobs/configs/quickstart.yaml train.lora_r=8 --dry-run"
    parser = argparse.ArgumentParser(description=description, epilog=example)
    parser.add_argument("--config", type=Path, help="YAML such as jobs/configs/quickstart.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the merged config and the resources, then end"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser
