"""What every job script shares: arguments, the connection to Ray, errors in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llava_ray.config.run import RunConfig, load_config, to_yaml
from llava_ray.errors import ConfigError, LlavaRayError, ResourceError

T = TypeVar("T")

EXIT_USER_ERROR = 2


def run_job(
    description: str | None, stage: Callable[[RunConfig], T], argv: Sequence[str] | None = None
) -> T | None:
    """Parse --config and overrides, connect to Ray and run a stage.

    A LlavaRayError ends the process with one line on stderr and exit code 2; `--dry-run` prints
    the merged config and the resources that would be asked for, and returns None.
    """
    args = _parser(description).parse_args(argv)
    set_up_logging()
    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            from llava_ray.dry_run import describe_requests

            print(to_yaml(config) + describe_requests(config))
            return None
        check_storage(config)
        connect()
        return stage(config)
    except LlavaRayError as error:
        fail(error)
        raise AssertionError from error


def fail(error: LlavaRayError) -> None:
    """Print an expected failure in one line and exit with 2."""
    # Ray wraps a task's error in a class that is also a LlavaRayError but prints its traceback.
    cause = getattr(error, "cause", None) or error
    print(f"error: {' '.join(str(cause).split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def set_up_logging() -> None:
    """Log with time and level to stderr; also the hook that Ray runs in each worker."""
    logging.basicConfig(
        level=os.environ.get("LLAVA_RAY_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def check_storage(config: RunConfig) -> None:
    """Refuse a relative storage path inside a Ray job, whose folder vanishes with the job.

    Raises ConfigError.
    """
    uri = config.storage.uri
    relative = "://" not in uri and not Path(uri).expanduser().is_absolute()
    if relative and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ConfigError(
            f"storage.uri {uri!r} is relative, and a job's folder vanishes with it: "
            "give an absolute path or a URI"
        )


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
            runtime_env={"worker_process_setup_hook": "llava_ray.cli.set_up_logging"},
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "a new local one")
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"no Ray cluster at {address}: {reason}; start one with "
            "'python -m llava_ray.cluster up cluster/local.yaml'"
        ) from error


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, help="YAML such as jobs/configs/quickstart.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the merged config and the resources, then end"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser
