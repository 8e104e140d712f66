"""Measure what the real Serve application adds to the bare engine, at 1, 8 and 64 clients.

On this machine's CPU with the embedded model; on its GPUs with LLaVA-1.5-7B's shapes and random
weights, or with a variant of a finished run (storage.uri/variant/ID). Needs no download and no
running Ray:
python jobs/bench/serving.py --out jobs/results/serving.json
python jobs/bench/serving.py --out jobs/results/serving_7b_h100.json --shapes-7b hqq-w4-g64
"""

import argparse
import logging
from pathlib import Path

from llava_ray.bench.serving import run
from llava_ray.console import errors_in_one_line

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--variant", dest="variant_uri", metavar="URI", help="of a variant")
    served.add_argument("--shapes-7b", metavar="SLUG", help="such as hqq-w4-g64")
    parser.add_argument("--port", type=int, default=8731, help="a free one")
    parser.add_argument("--rounds", type=int, help="of each side, at each load; default: 9, 9, 5")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with errors_in_one_line():
        run(**vars(arguments))
    print(arguments.out)
