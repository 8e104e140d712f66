"""Time each method's quantization of LLaVA-1.5-7B's shapes, with peak memory and size.

Random weights, no Ray; 14 GB are written below --work once:
python jobs/bench/quantize.py --out quantize_7b.json --only hqq-w4-g64,bnb-nf4
"""

import argparse
import logging
import sys
from pathlib import Path

# The repository, so that a machine without the package installed can run this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava_ray.bench.quantize import SLUGS, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_quantize"))
    parser.add_argument("--model", type=Path, help="another LLaVA folder; default: 7B shapes")
    parser.add_argument("--only", default=",".join(SLUGS), help="slugs, joined by commas")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(run(arguments.out, arguments.work, arguments.model, arguments.only.split(",")))
