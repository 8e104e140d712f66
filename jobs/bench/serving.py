"""Measure what the real Serve application adds to the bare engine, at 1, 8 and 64 clients.

On this machine's CPU with the embedded model, or on its GPUs with a variant of a finished run
(storage.uri/variant/ID); needs no download and no running Ray:
python jobs/bench/serving.py --out jobs/results/serving.json
python jobs/bench/serving.py --out jobs/results/serving_7b_h100.json --variant VARIANT_URI
"""

import argparse
import logging
from pathlib import Path

from llava_ray.bench.serving import run
from llava_ray.console import fail
from llava_ray.errors import LlavaRayError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--variant", help="URI of a variant; default: the embedded model's")
    parser.add_argument("--port", type=int, default=8731, help="a free one")
    parser.add_argument("--rounds", type=int, help="of each side, at each load; default: 9, 9, 5")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = arguments.out
    try:
        run(out, variant_uri=arguments.variant, port=arguments.port, rounds=arguments.rounds)
    except LlavaRayError as error:
        fail(error)
    print(out)
