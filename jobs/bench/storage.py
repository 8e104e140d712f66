"""Time many small files up and down on an S3 server that waits before each answer.

The server, moto's, is started for it: python jobs/bench/storage.py --out storage.json --files 2000
"""

import argparse
import logging
import os
from pathlib import Path

from llava_ray.bench.readme import table
from llava_ray.bench.s3_server import BUCKET, s3_server
from llava_ray.bench.storage import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--files", type=int, default=25_000)
    parser.add_argument("--one-by-one", type=int, default=300, help="files moved singly")
    parser.add_argument("--delay-s", type=float, default=0.1, help="before each answer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with s3_server(arguments.delay_s) as server:
        os.environ |= server.environment
        run(
            arguments.out, f"s3://{BUCKET}/bench", files=arguments.files,
            one_by_one=arguments.one_by_one, delay_s=arguments.delay_s,
        )  # fmt: skip
    print(table("storage", arguments.out))
    print(arguments.out)
