"""Score the embedded model before and after the quickstart's fine-tune, and every variant of it.

python jobs/bench/embedded.py jobs/results/embedded.json --config jobs/configs/embedded.yaml
Further arguments are overrides as of the other jobs.
"""

import sys
from pathlib import Path

from llava_ray.bench.embedded import score
from llava_ray.cli import run_job

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_job(__doc__, lambda config: print(score(config, Path(sys.argv[1]))), sys.argv[2:])
