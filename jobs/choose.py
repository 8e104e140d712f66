"""Choose the variant to serve and write the report."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_choose

if __name__ == "__main__":
    record = run_job(__doc__, run_choose)
    if record is not None:
        print(record.uri)
