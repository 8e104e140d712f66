"""Break a small cluster on this machine in the middle of each stage, and tell what was lost.

python tests/chaos [train:node serve ...]
"""

import argparse
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import drill
from drill_faults import scenarios
from drill_results import outcome_line, write_results

from llava_ray.console import EXIT_USER_ERROR, fail, set_up_logging
from llava_ray.errors import LlavaRayError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", help="such as train:node or serve; default: all")
    parser.add_argument("--out", type=Path, default=Path("jobs/results/drill.json"))
    parser.add_argument("--folder", type=Path, help="keep artifacts here, for a later drill")
    args = parser.parse_args(argv)
    set_up_logging()
    # Ended from outside, it takes its clusters with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    missed = False
    with tempfile.TemporaryDirectory(prefix="drill-") as temporary:
        try:
            for outcome in drill.run(scenarios(args.scenarios), args.folder or Path(temporary)):
                write_results(args.out, [outcome])
                print(outcome_line(outcome), flush=True)
                missed |= bool(outcome.missed)
        except LlavaRayError as error:
            fail(error)
    print(args.out)
    return EXIT_USER_ERROR if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
