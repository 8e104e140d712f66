"""Train the embedded model from scratch on generated scene text, in runs that resume."""

import argparse
import sys
from pathlib import Path

# The folder above, so that a machine without the package installed can run this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_ray.config.overrides import load_section
from llava_ray.embedded.pretrain.job import ACTIONS, run
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.errors import LlavaRayError


def main() -> None:
    """Parse, run one action, print what it left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        print(run(args.action, load_section(PretrainSettings, {}, args.settings)))
    except LlavaRayError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
