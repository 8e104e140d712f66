"""Serve the chosen variant behind an OpenAI endpoint."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_deploy

if __name__ == "__main__":
    record = run_job(__doc__, run_deploy)
    if record is not None:
        print(record.url)
