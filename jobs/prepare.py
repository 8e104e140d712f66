"""Turn captions and images into LLaVA JSON with a fixed split."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_prepare

if __name__ == "__main__":
    record = run_job(__doc__, run_prepare)
    if record is not None:
        print(record.uri)
