"""Run commands in a clean clone with an empty home; record their time, disk and memory as JSON.

python jobs/bench/measure.py jobs/results/costs.json 'bash jobs/quickstart.sh' 'bash tests/run.sh'
The commands share the clone and the home, in the order given; all they leave is deleted.
"""

import logging
import sys
from pathlib import Path

from llava_ray.bench.measure import measure
from llava_ray.console import errors_in_one_line

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with errors_in_one_line():
        print(measure(Path(sys.argv[1]), sys.argv[2:]))
