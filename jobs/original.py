"""Write the merged model in the layout of LLaVA's own repository, for its code and its serving.

llava-ray original --out my-llava --config my.yaml
"""

from pathlib import Path

from llava_ray.artifacts.storage import check_empty
from llava_ray.artifacts.store import local_folder
from llava_ray.cli import argument_parser, connect
from llava_ray.config.run import load_config
from llava_ray.console import errors_in_one_line, set_up_logging
from llava_ray.models.original import write_original
from llava_ray.pipeline import run_merge

if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or a new one")
    arguments = parser.parse_intermixed_args()
    set_up_logging()
    with errors_in_one_line():
        config = load_config(arguments.config, arguments.overrides)
        check_empty(arguments.out)
        if not arguments.dry_run:
            connect()
            write_original(local_folder(run_merge(config)), arguments.out)
        print(arguments.out)
