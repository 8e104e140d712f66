"""Search LoRA settings with Ray Tune."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_sweep

if __name__ == "__main__":
    record = run_job(__doc__, run_sweep)
    if record is not None:
        print(record.uri)
