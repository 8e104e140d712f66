"""Time many small files up and down on an S3 server that waits before each answer.

python tests/s3_server.py 0.1   # prints what to export and serves s3://bucket
python jobs/bench/storage.py --out storage.json --uri s3://bucket/bench --files 2000 --delay-s 0.1
"""

import argparse
import logging
from pathlib import Path

from llava_ray.bench.readme import table
from llava_ray.bench.storage import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--uri", required=True, help="an empty place on the server")
    parser.add_argument("--files", type=int, default=25_000)
    parser.add_argument("--one-by-one", type=int, default=300, help="files moved singly")
    parser.add_argument("--delay-s", type=float, default=0.1, help="the server's, for the record")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(**vars(arguments))
    print(table("storage", arguments.out))
    print(arguments.out)
