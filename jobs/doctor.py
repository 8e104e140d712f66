"""Check a cluster YAML and a job's config without starting anything; exit code 2 on a problem."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_ray.config.run import load_config
from llava_ray.console import EXIT_USER_ERROR, errors_in_one_line
from llava_ray.doctor import examine
from llava_ray.shipped import shipped


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cluster", type=Path, help="YAML such as cluster/aws.yaml")
    parser.add_argument("--config", type=Path, help="the job's config")
    parser.add_argument("--working-dir", type=Path, default=Path.cwd())
    parser.add_argument("--runtime-env", type=Path, default=shipped("jobs/runtime_env.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    with errors_in_one_line():
        config = load_config(args.config, args.overrides)
        findings = examine(args.cluster, config, args.working_dir.absolute(), args.runtime_env)
    for finding in findings:
        print(f"{'ok ' if not finding.problems else 'BAD'} {finding.check}")
        for line in (*finding.problems, *finding.notes):
            print(f"      {line}")
    return EXIT_USER_ERROR if any(finding.problems for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
