"""Measure what LoRA over a 2-bit base wins back on the embedded model, over three seeds.

python jobs/bench/recover.py jobs/results/hqq_recovery.json --config jobs/configs/embedded.yaml
Further arguments are overrides as of the other jobs.
"""

import sys
from pathlib import Path

from llava_ray.bench.embedded import recover
from llava_ray.cli import run_job

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_job(__doc__, lambda config: print(recover(config, Path(sys.argv[1]))), sys.argv[2:])
