"""Measure how much of HQQ's loss LoRA wins back, on the held-out captions; needs no Ray.

python jobs/recover.py --out jobs/results/hqq_recovery.json train.max_steps=60 train.batch_size=8
"""

import argparse
import logging
from pathlib import Path

from llava_ray import prepare
from llava_ray.cli import fail
from llava_ray.config import load_config
from llava_ray.errors import LlavaRayError
from llava_ray.train.recovery import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--bits", default="4,3,2", help="of the roundings, separated by commas")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = load_config(arguments.config, arguments.overrides)
        bits = tuple(int(number) for number in arguments.bits.split(","))
        run(config, prepare.run(config), arguments.out, bits=bits)
    except LlavaRayError as error:
        fail(error)
    print(arguments.out)
