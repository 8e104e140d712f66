"""Measure what the real Serve application adds to the bare engine, at 1, 8 and 64 clients.

On this machine's CPU with the embedded model; needs no download and no running Ray:
python jobs/bench_serving.py --out jobs/results/serving.json
"""

import argparse
import logging
from pathlib import Path

from llava_ray.serving.bench_serving import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--port", type=int, default=8731, help="a free one")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, at each load")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(arguments.out, port=arguments.port, rounds=arguments.rounds)
    print(arguments.out)
