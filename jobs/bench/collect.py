"""Gather what each stage of finished runs took, with the report's rows, into one JSON.

python jobs/bench/collect.py OUT.json STORAGE [STORAGE ...] [--note TEXT] [--keep ID ...]
STORAGE is a run's storage.uri. Of what OUT.json has already, the rows of these ids stay.
"""

import argparse
from pathlib import Path

from llava_ray.console import errors_in_one_line
from llava_ray.report.stages import collect

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("storage", nargs="+")
    parser.add_argument("--note", default="", help="conditions that the records do not hold")
    parser.add_argument("--keep", nargs="*", default=[], metavar="ID", help="rows to keep")
    arguments = parser.parse_args()
    with errors_in_one_line():
        print(collect(arguments.storage, arguments.out, arguments.note, arguments.keep))
