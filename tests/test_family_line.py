"""Every family through the whole line, from pictures to a served answer (issue: LLaVA as a family).

With LLAVA_RAY_SLOW=1 it writes jobs/results/families.json; a default run looks whether it is whole.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_port import free_port
from tiny_families import FAMILIES, write_family
from web_server import data_url

from llava_ray import pipeline
from llava_ray.artifacts.records import Scorecard
from llava_ray.bench.results import write
from llava_ray.config.run import RunConfig, load_config

RESULTS = Path(__file__).parents[1] / "jobs" / "results" / "families.json"
SLUGS = (
    "none-fp16", "bnb-int8", "bnb-nf4", "hqq-w8-g64", "hqq-w4-g64", "awq-w4-g32", "gguf-f16",
    "gguf-q8_0",
)  # fmt: skip
REFUSED = {
    "llama-yarn": "rope_type 'yarn'",
    "mistral-window": "a window of 24 tokens", "qwen2-window": "a window of 24 tokens",
    "clip-full": "always drops the class token", "clip-two-layers": "one layer only",
    "siglip-full": "always drops the class token", "siglip-default": "no place in llama.cpp",
    "llava-next": "newline tokens", "llava-next-mistral": "newline tokens",
    "llava-next-siglip": "newline tokens",
}  # fmt: skip
"""By family, why it has no GGUF."""


def config_of(folder: Path, port: int) -> RunConfig:
    return load_config(
        None,
        [
            f"storage.uri={folder / 'runs'}", f"model.path={folder / 'base'}", "data.limit=16",
            "data.test_share=0.25", "train.max_steps=4", "train.lora_r=4", "train.batch_size=2",
            "train.num_workers=1", "train.cpus_per_worker=1", "train.trackers=[]",
            "train.zero_stage=0", f"quantize.variants=[{', '.join(SLUGS)}]",
            "quantize.calibration_samples=8", "benchmark.caption_samples=2",
            "benchmark.fidelity_samples=4", "benchmark.max_new_tokens=8",
            "benchmark.decode_tokens=8", "benchmark.repeats=1", "choose.max_kl_divergence=null",
            "choose.prefer=fidelity", "resources.node_types=up", f"serve.port={port}",
            "serve.cpus_per_replica=0.5", "serve.context=512", "serve.max_concurrent_requests=2",
        ],
    )  # fmt: skip


def run_line(name: str, folder: Path, port: int) -> dict[str, Any]:
    """Return what each stage made of a family."""
    write_family(name, folder / "base")
    config = config_of(folder, port)
    adapter = pipeline.run_train(config)
    merged = pipeline.run_merge(config)
    methods, refused = dict[str, Any](), ""
    for found in pipeline.run_benchmark(config):
        if isinstance(found, Scorecard):
            methods[found.slug] = float(f"{found.kl_divergence.median:.2g}")
        else:
            methods[found.slug] = "refused"
            refused = re.sub(r"^variant '\S+': ", "", found.reason)
    deployed = pipeline.run_deploy(config)
    content = [
        {"type": "text", "text": "What does the sign say?"},
        {"type": "image_url", "image_url": {"url": data_url()}},
    ]
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json={
            "model": deployed.model_name, "max_tokens": 8, "ignore_eos": True,
            "messages": [{"role": "user", "content": content}],
        },
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return {
        "family": name,
        "train_loss": round(adapter.train_loss, 2),
        "merge": float(f"{merged.max_logit_difference:.2g}"),
        **methods,
        "served": deployed.model_name,
        "answer_tokens": answer.json()["usage"]["completion_tokens"],
        "why_refused": refused,
    }


def check(row: dict[str, Any]) -> None:
    reason = REFUSED.get(row["family"], "")
    for slug in SLUGS:
        if slug.startswith("gguf") and reason:
            assert row[slug] == "refused", (row["family"], slug)
        else:
            assert row[slug] < 0.05, (row["family"], slug)
    assert reason in row["why_refused"] and bool(reason) == bool(row["why_refused"])
    assert row["merge"] < 1e-4 and row["answer_tokens"] == 8


def test_the_results_are_of_every_family_and_method() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [row["family"] for row in rows] == list(FAMILIES)
    for row in rows:
        check(row)


@pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="a minute for each of 15 families")
def test_every_family_goes_through_the_line(ray_local: None, tmp_path: Path) -> None:
    port = free_port()
    rows = [run_line(name, tmp_path / name, port) for name in FAMILIES]
    command = "LLAVA_RAY_SLOW=1 python -m pytest -n 0 tests/test_family_line.py"
    write(RESULTS, "families", {"command": command, "rows": rows})
    for row in rows:
        check(row)
