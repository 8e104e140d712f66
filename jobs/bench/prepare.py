"""Rows prepared a second, by the CPUs that Ray has: distinct JPEGs of 1024x768 beside a table.

Beside what Pillow alone needs to decode one, on one CPU in the same run.
python jobs/bench/prepare.py jobs/results/prepare.json 100000 2 1
"""

import io
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ray
from PIL import Image, ImageFilter

from llava_ray import prepare
from llava_ray.bench import results
from llava_ray.config.run import load_config


def write_rows(folder: Path, count: int) -> Path:
    """Write a table and its pictures, which differ by three values of their quantization table."""
    stream = io.BytesIO()
    noise = Image.frombytes("RGB", (256, 192), random.Random(0).randbytes(256 * 192 * 3))
    noise.resize((1024, 768)).filter(ImageFilter.GaussianBlur(2)).save(stream, "JPEG", quality=85)
    picture = bytearray(stream.getvalue())
    values = picture.index(b"\xff\xdb") + 5
    with (folder / "rows.csv").open("w", encoding="utf-8") as table:
        table.write("image,caption\n")
        for n in range(count):
            picture[values : values + 3] = 8 + n % 64, 8 + n // 64 % 64, 8 + n // 64**2 % 64
            (folder / f"{n}.jpg").write_bytes(picture)
            table.write(f"{n}.jpg,Sign {n}.\n")
    return folder / "rows.csv"


def decode_s(folder: Path, count: int) -> float:
    """Return the seconds in which Pillow turns a file into RGB, as the mean of some."""
    files = [folder / f"{n}.jpg" for n in range(min(count, 300))]
    begun = time.perf_counter()
    for file in files:
        Image.open(file).convert("RGB")
    return (time.perf_counter() - begun) / len(files)


if __name__ == "__main__":
    out, count, rows = Path(sys.argv[1]), int(sys.argv[2]), []
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder), count)
        alone = decode_s(Path(folder), count)
        for num_cpus in map(int, sys.argv[3:]):
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False)
            config = load_config(None, [f"storage.uri={folder}/runs", f"data.source={source}"])
            begun = time.monotonic()
            record = prepare.run(config)
            took = time.monotonic() - begun
            ray.shutdown()
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rows.append(
                {
                    "rows": record.num_rows, "cpus": num_cpus, "seconds": round(took, 1),
                    "rows_per_s": round(count / took, 1),
                    "decode_alone_rows_per_s": round(num_cpus / alone, 1),
                    "MB": record.size_bytes // 10**6,
                    "shards": sum(name.endswith(".tar") for name in record.files),
                    "driver_peak_MB": peak // 10**6,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            shutil.rmtree(f"{folder}/runs")
    print(results.write(out, "prepare", {"rows": rows}))
