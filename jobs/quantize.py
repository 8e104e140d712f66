"""Quantize the merged model by every method asked for, as parallel Ray tasks."""

import sys

from llava_ray.artifacts.records import Variant
from llava_ray.cli import run_job
from llava_ray.pipeline import run_quantize
from llava_ray.quantize.registry import known_slugs

if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print("\n".join(known_slugs()))
        sys.exit()
    for result in run_job(__doc__, run_quantize) or ():
        print(result.uri if isinstance(result, Variant) else f"{result.slug}: {result.reason}")
