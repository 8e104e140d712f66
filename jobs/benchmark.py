"""Measure size, speed and fidelity of every variant on the same pixels."""

from llava_ray.artifacts.records import Scorecard
from llava_ray.cli import run_job
from llava_ray.pipeline import run_benchmark

if __name__ == "__main__":
    for result in run_job(__doc__, run_benchmark) or ():
        print(result.uri if isinstance(result, Scorecard) else f"{result.slug}: {result.reason}")
