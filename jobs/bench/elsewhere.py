"""Ask the variants of a finished run by other programs, with the code of their cards.

python jobs/bench/elsewhere.py --out jobs/results/elsewhere.json --config my.yaml \
    --python transformers-5=.venv/bin/python --python transformers-4=OTHER/bin/python --tools DIR
"""

from pathlib import Path

from llava_ray.bench.elsewhere import run
from llava_ray.cli import argument_parser
from llava_ray.config.run import load_config
from llava_ray.console import errors_in_one_line, set_up_logging

if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--python", action="append", default=[], metavar="READER=PYTHON")
    parser.add_argument("--tools", type=Path, help="folder of llama.cpp's programs")
    arguments = parser.parse_intermixed_args()
    set_up_logging()
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    with errors_in_one_line():
        config = load_config(arguments.config, arguments.overrides)
        paths = {reader: Path(python).absolute() for reader, python in pythons.items()}
        print(run(config, arguments.out, paths, arguments.tools))
