"""Compare two variants on the same held-out samples, such as text and image calibration.

python jobs/bench/compare.py awq-w4-g128-text awq-w4-g128 jobs/results/awq_calibration.json
Further arguments are --config and overrides as of the other jobs.
"""

import sys
from pathlib import Path

from llava_ray.bench.compare import compare
from llava_ray.cli import run_job

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    first, second, out = sys.argv[1:4]
    run_job(__doc__, lambda config: print(compare(config, first, second, Path(out))), sys.argv[4:])
