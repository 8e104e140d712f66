"""Predict time and price of a run on a cluster YAML for 1 to 256 GPUs, from measured rates."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_ray.cli import fail
from llava_ray.cluster.table import plan_table
from llava_ray.config.run import load_config
from llava_ray.errors import LlavaRayError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cluster", type=Path, help="YAML such as cluster/aws.yaml")
    parser.add_argument("--config", type=Path, help="the job's config")
    parser.add_argument("--samples", type=int, required=True, help="rows of the training set")
    parser.add_argument("--rates", type=Path, default=Path("cluster/rates.yaml"))
    parser.add_argument("--measured", help="storage URI of a run to take the rates from")
    parser.add_argument("--relative-speed", type=float, default=1, help="over the measured GPU")
    parser.add_argument("--interruptions", type=float, default=0, help="per spot node and hour")
    parser.add_argument("--restart-s", type=float, default=0, help="until training goes on")
    parser.add_argument("--checkpoint-every-s", type=float, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    try:
        print(plan_table(load_config(args.config, args.overrides), args))
    except LlavaRayError as error:
        fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
