"""Fine-tune LLaVA with LoRA on Ray Train workers under DeepSpeed."""

from llava_ray.cli import run_job
from llava_ray.pipeline import run_train

if __name__ == "__main__":
    record = run_job(__doc__, run_train)
    if record is not None:
        print(record.uri)
