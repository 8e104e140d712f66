"""Rows as LLaVA-Instruct has them, from prepare to a served answer (C6, C9, C10).

With LLAVA_RAY_SLOW=1 it writes jobs/results/instruct.json; a default run looks whether it is whole.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_port import free_port
from PIL import Image, ImageDraw
from web_server import data_url

from llava_ray import pipeline
from llava_ray.bench.results import write
from llava_ray.config.run import load_config

RESULTS = Path(__file__).parents[1] / "jobs" / "results" / "instruct.json"
ROWS, PICTURES = 5000, 400


def write_rows(folder: Path, count: int) -> Path:
    """Write LLaVA JSON: one to five exchanges, ids that repeat, text alone, two pictures."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for number in range(PICTURES):
        image = Image.new("RGB", (320, 240), (number % 256, 90, 130))
        ImageDraw.Draw(image).text((60, 100), f"SIGN {number}", fill="white", font_size=40)
        image.save(folder / "images" / f"{number:06d}.jpg")
    rows: list[dict[str, Any]] = []
    for index in range(count):
        first = draw.randrange(PICTURES)
        shown = [first, first ^ 1][: draw.choice((0, 1, 1, 1, 1, 2))]
        said = []
        for turn in range(draw.randint(1, 5)):
            tokens = "<image>\n" * len(shown) if turn == 0 else ""
            question = f"What is said in exchange {turn}?"
            value = question + "\n" + tokens.strip() if index % 2 and tokens else tokens + question
            answer = f"Exchange {turn} is about {shown or 'nothing'}."
            said += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        row: dict[str, Any] = {"id": str(index % 1000), "conversations": said}
        names = [f"{number:06d}.jpg" for number in shown]
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        if index % 10 == 9:
            del row["id"]
        rows.append(row)
    path = folder / "instruct.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_line(folder: Path) -> dict[str, Any]:
    source, port = write_rows(folder, ROWS), free_port()
    config = load_config(
        None,
        [
            f"storage.uri={folder / 'runs'}", f"data.source={source}",
            f"data.images={folder / 'images'}", "data.test_share=0.01", "train.max_steps=20",
            "train.batch_size=4", "train.num_workers=2", "train.cpus_per_worker=1",
            "train.trackers=[]", "quantize.variants=[none-fp16, gguf-q8_0]",
            "benchmark.fidelity_samples=8", "benchmark.caption_samples=4",
            "resources.node_types=up", f"serve.port={port}",
        ],
    )  # fmt: skip
    dataset, adapter = pipeline.run_prepare(config), pipeline.run_train(config)
    deployed = pipeline.run_deploy(config)
    content = [
        {"type": "image_url", "image_url": {"url": data_url()}},
        {"type": "text", "text": "What is said in exchange 0?"},
    ]
    body = {"model": deployed.model_name, "messages": [{"role": "user", "content": content}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return {
        "rows": dataset.num_rows, "train": dataset.num_train, "held_out": dataset.num_test,
        "exchanges": dataset.num_exchanges, "pictures_shown": dataset.num_images,
        "rejected": dataset.rejected, "prepare_s": dataset.wall_s, "steps": adapter.steps,
        "train_loss": adapter.train_loss, "served": deployed.model_name,
        "finish_reason": answer.json()["choices"][0]["finish_reason"],
    }  # fmt: skip


def check(found: dict[str, Any]) -> None:
    assert found["rows"] == ROWS and found["rejected"] == {}
    assert found["train"] + found["held_out"] == ROWS and found["held_out"] >= 1
    assert found["exchanges"] > 2 * ROWS and found["steps"] == 20
    assert found["finish_reason"] in ("stop", "length")


def test_the_results_are_of_all_rows() -> None:
    check(json.loads(RESULTS.read_text())["rows"][0])


@pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="takes some minutes")
def test_five_thousand_rows_become_a_served_answer(ray_local: None, tmp_path: Path) -> None:
    found = run_line(tmp_path)
    command = "LLAVA_RAY_SLOW=1 python -m pytest -n 0 tests/test_instruct_data.py"
    write(RESULTS, "instruct", {"command": command, "rows": [found]})
    check(found)
