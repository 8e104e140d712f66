"""Time the served engine's decode step beside plain transformers on one GPU.

LLaVA-1.5-7B's shapes with random weights; needs no download:
python jobs/bench/decode.py --out decode.json
"""

import argparse
import logging
from pathlib import Path

from llava_ray.bench.decode import run
from llava_ray.bench.readme import table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(arguments.out)
    print(table("decode", arguments.out))
    print(arguments.out)
