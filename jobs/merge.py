"""Fold the adapter into the base model, in fp32."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_merge

if __name__ == "__main__":
    record = run_job(__doc__, run_merge)
    if record is not None:
        print(record.uri)
