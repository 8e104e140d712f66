"""Publish the chosen variant with its card and passport on the Hugging Face hub.

llava-ray publish --repo me/llava-signs --config my.yaml
llava-ray publish --repo me/llava-signs --dry-run     # writes ./llava-signs instead
"""

import tempfile
from pathlib import Path

from llava_ray.cli import argument_parser
from llava_ray.config.run import load_config
from llava_ray.console import errors_in_one_line, set_up_logging
from llava_ray.publish import find_variant, lay_out, upload

if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="made if it is missing")
    parser.add_argument("--variant", metavar="SLUG", help="another than the chosen one")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    arguments = parser.parse_intermixed_args()
    set_up_logging()
    with errors_in_one_line(), tempfile.TemporaryDirectory() as scratch:
        config = load_config(arguments.config, arguments.overrides)
        variant = find_variant(config, arguments.variant)
        name = arguments.repo.rpartition("/")[2]
        if arguments.dry_run:
            folder = lay_out(variant, Path(name))
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                print(f"{path.stat().st_size:>14,}  {path}")
        else:
            folder = lay_out(variant, Path(scratch) / "repo")
            message = f"{variant.slug}, {variant.id}"
            print(upload(folder, arguments.repo, private=not arguments.public, message=message))
