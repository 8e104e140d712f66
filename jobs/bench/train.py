"""Time LoRA training beside plain transformers + peft on one machine; needs no download.

Needs torch, transformers, peft and, for the rows with ZeRO, deepspeed:
python jobs/bench/train.py --out jobs/results/train_h100.json
python jobs/bench/train.py --out train.json --only zero2-b8,replica-b8@2
"""

import argparse
import logging
from pathlib import Path

from llava_ray.bench.readme import table
from llava_ray.bench.train import run
from llava_ray.console import errors_in_one_line

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--minutes", type=float, default=9, help="after these no row is started")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    only = [name for name in arguments.only.split(",") if name]
    with errors_in_one_line():
        run(arguments.out, only=only, minutes=arguments.minutes, tiny=arguments.tiny)
        print(table("train", arguments.out))
    print(arguments.out)
