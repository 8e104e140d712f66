"""Quantize the embedded model on whatever nodes the autoscaler brings; prints what happened."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import ray
from ray.util.state import list_tasks

from llava_ray import prepare, quantize
from llava_ray.artifacts.records import MergedModel
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import load_config
from llava_ray.models.folder import EMBEDDED, weights_sha256


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(storage: str, captions: str) -> None:
    # AutoAWQ is not in the base environment: its task brings its own.
    variants = ["none-fp16", "bnb-nf4", "hqq-w4-g64", "hqq-w8-g64", "awq-w4-g128"]
    config = load_config(
        None,
        [
            f"storage.uri={storage}",
            f"data.source={captions}",
            f"quantize.variants={json.dumps(variants)}",
            "quantize.calibration_samples=2",
        ],
    )
    ray.init(logging_level="ERROR")
    before, counts, over = alive(), [], threading.Event()
    dataset = prepare.run(config)
    with ArtifactStore(storage).build(MergedModel, "merged-0", settings={}) as build:
        shutil.copytree(EMBEDDED, build.folder, dirs_exist_ok=True)
        merged = build.finish(
            MergedModel,
            device="cpu",
            base_model="embedded",
            base_model_sha256=weights_sha256(EMBEDDED),
            max_logit_difference=0,
            mean_logit_difference=0,
            rounded_max_logit_difference=0,
        )

    def watch() -> None:
        while not over.wait(0.5):
            counts.append(alive())

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = quantize.run(config, merged, dataset)
    over.set()
    watcher.join()
    ran_on = {task.name: task.node_id for task in list_tasks() if task.name.startswith("quantize ")}
    start = time.monotonic()
    while alive() > 1 and time.monotonic() - start < 120:
        time.sleep(1)
    report = {
        "before": before,
        "most": max(counts),
        "after": alive(),
        "gone_s": round(time.monotonic() - start, 1),
        "status": {o.slug: getattr(o, "reason", o.status) for o in outcomes},
        "ran_on": ran_on,
    }
    Path(storage, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
