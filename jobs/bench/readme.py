"""Write README's tables anew from the JSON under jobs/results/."""

from pathlib import Path

from llava_ray.bench.readme import fill
from llava_ray.console import fail
from llava_ray.errors import LlavaRayError

if __name__ == "__main__":
    readme = Path("README.md")
    try:
        readme.write_text(fill(readme.read_text("utf-8"), Path("jobs/results")), encoding="utf-8")
    except LlavaRayError as error:
        fail(error)
    print(readme)
