"""Estimate a training run's memory from its config and the model's shapes; needs no weights.

python jobs/estimate.py --config jobs/configs/llava-1.5-7b-textocr.yaml train.zero_stage=2
"""

import argparse
from pathlib import Path

from llava_ray.config.run import load_config
from llava_ray.console import errors_in_one_line
from llava_ray.train.estimate import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--workers", type=int, help="default: train.num_workers, or 1")
    parser.add_argument("--tokens", type=int, help="of a sample; default: a caption of 160")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    with errors_in_one_line():
        config = load_config(arguments.config, arguments.overrides)
        workers = arguments.workers or config.train.num_workers or 1
        print(run(config, workers=workers, tokens=arguments.tokens))
