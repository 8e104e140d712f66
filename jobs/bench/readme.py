"""Write the tables of README.md and jobs/results/README.md anew from the JSON beside the latter."""

from pathlib import Path

from llava_ray.bench.readme import PAGES, fill
from llava_ray.console import fail
from llava_ray.errors import LlavaRayError

if __name__ == "__main__":
    for page in PAGES:
        try:
            page.write_text(fill(page.read_text("utf-8"), Path("jobs/results")), encoding="utf-8")
        except LlavaRayError as error:
            fail(error)
        print(page)
