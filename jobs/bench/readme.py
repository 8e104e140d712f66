"""Write the tables of README.md and jobs/results/README.md anew from the JSON beside the latter."""

import argparse
from pathlib import Path

from llava_ray.bench.readme import PAGES, fill
from llava_ray.console import errors_in_one_line
from llava_ray.errors import ConfigError

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in PAGES:
        with errors_in_one_line():
            if not page.exists():
                raise ConfigError(f"no {page} here: run this in the repository's folder")
            page.write_text(fill(page.read_text("utf-8"), Path("jobs/results")), encoding="utf-8")
        print(page)
