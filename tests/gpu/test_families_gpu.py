"""Other backbones and towers on a GPU, by the fast kernels where they fit and without elsewhere.

With LLAVA_RAY_SLOW=1 it writes jobs/results/families_h100.json.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_families import FAMILIES, write_family  # noqa: E402

from llava_ray.bench.results import write  # noqa: E402
from llava_ray.inference.engine import Prompt  # noqa: E402
from llava_ray.models.family import family_of  # noqa: E402
from llava_ray.quantize.registry import spec_for  # noqa: E402
from llava_ray.quantize.spec import Calibration  # noqa: E402

KL = 1e-3
"""Nats a token at most, of fp16 on a GPU against transformers in fp32."""
RESULTS = Path(__file__).parents[2] / "jobs" / "results" / "families_h100.json"


def test_engines_on_a_gpu_score_and_decode_as_transformers_does(tmp_path: Path) -> None:
    rows = [{"family": name, **measure(name, tmp_path / name)} for name in FAMILIES]
    for row in rows:
        assert row["kl_divergence"] <= KL and row["decoded_difference"] <= 0.05, row
    if "LLAVA_RAY_SLOW" in os.environ:
        command = "LLAVA_RAY_SLOW=1 python -m pytest tests/gpu/test_families_gpu.py"
        write(RESULTS, "families_h100", {"command": command, "rows": rows}, "cuda")


def measure(name: str, folder: Path) -> dict[str, Any]:
    model = write_family(name, folder / "base")
    family, out = family_of(folder / "base"), folder / "out"
    out.mkdir()
    spec = spec_for("none-fp16")
    spec.quantize(folder / "base", out, Calibration("", 0), "cuda")
    engine: Any = spec.open_engine(out, device="cuda", slots=2, context=256)
    draw = np.random.default_rng(0)
    image = family.pixels(Image.fromarray(draw.integers(0, 255, (40, 75, 3), dtype=np.uint8)))
    ids = (1, *[1022] * image.num_tokens, *draw.integers(3, 1000, 60).tolist())
    answer = draw.integers(3, 1000, 20).tolist()
    with torch.no_grad():
        shown = family.inputs([image])
        whole = model(input_ids=torch.tensor([[*ids, *answer]]), **shown).logits[0]
    expected = whole[len(ids) - 1 : -1].log_softmax(-1)
    found = engine.score(Prompt(ids, (image,)), answer).float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    slot, _ = engine.prefill(Prompt(ids, (image,)))
    for token in answer[:4]:
        (logits,) = engine.decode([slot], torch.tensor([token], device="cuda"))
    gap = (logits.float().cpu() - whole[len(ids) + 3]).abs().max() / whole.abs().max()
    kernel = engine.kernel_name(1)
    engine.close()
    return {
        "kernel": kernel, "kl_divergence": float(kl.mean()), "decoded_difference": float(gap)
    }  # fmt: skip
