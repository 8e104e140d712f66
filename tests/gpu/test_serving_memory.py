"""The 7B's variants start and fill all their slots on a GPU with 24 GB."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llava_ray.bench.model import (  # noqa: E402
    Layout,
    make_prompt,
    rounded,
)
from llava_ray.config.run import ServeConfig  # noqa: E402
from llava_ray.inference.torch.engine import TorchEngine  # noqa: E402
from llava_ray.inference.torch.kernels.weights import PackedLinear, pack  # noqa: E402
from llava_ray.models.folder import EMBEDDED  # noqa: E402
from llava_ray.models.shapes import LLAVA_7B, random_model  # noqa: E402
from llava_ray.server.memory import footprint, memory_bytes, slots_within  # noqa: E402

L4_BYTES = int(22.5 * 2**30)
BITS = {"int8": 8, "awq-g128": 4.25, "hqq-g64": 4.5}
LAYOUTS: list[Layout] = ["int8", "awq-g128", "hqq-g64"]
OUT = os.environ.get("LLAVA_RAY_GPU_RESULTS")
"""Folder that gets what was found, as JSON."""


class _Served:
    def __init__(self, layout: str, size_bytes: int) -> None:
        self.slug, self.method, self.size_bytes = layout, layout.partition("-")[0], size_bytes
        self.bits_per_weight = BITS[layout]


@pytest.fixture(scope="module", autouse=True)
def small_gpu() -> Iterator[None]:
    """Leave 24 GB of this GPU free: another process has the rest."""
    free, _ = memory_bytes("cuda")
    code = (
        f"import torch; x = torch.empty({free - L4_BYTES - 600 * 2**20}, dtype=torch.uint8, "
        "device='cuda'); print('there', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as ballast:
        assert ballast.stdout is not None and ballast.stdout.readline() == b"there\n"
        yield
        ballast.kill()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_7b_starts_and_fills_its_slots_on_24_gb(layout: Layout) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    assert free < 1.05 * L4_BYTES
    model: Any = random_model(LLAVA_7B, "cuda", torch.float16).eval()
    model.generation_config.eos_token_id = None
    layers = model.model.language_model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            values = rounded(module.weight.data.float(), layout)
            layers.set_submodule(name, PackedLinear(pack(values)))
    del module, values
    torch.cuda.empty_cache()
    size = torch.cuda.memory_allocated()
    wanted = ServeConfig().max_concurrent_requests
    found = footprint(_Served(layout, size), LLAVA_7B["text_config"], device="cuda", context=2048)
    slots = slots_within([found], free, wanted)
    torch.cuda.reset_peak_memory_stats()
    engine = TorchEngine(model, folder=EMBEDDED, device="cuda", slots=slots, context=2048)
    del model
    engine.warm_up()
    engine.keep_prefixes(32)
    taken = [engine.prefill(make_prompt(2000))[0] for _ in range(slots)]
    tokens = torch.zeros(slots, dtype=torch.int64, device="cuda")
    for _ in range(40):
        engine.decode(taken, tokens)
    torch.cuda.synchronize()
    left = torch.cuda.mem_get_info()[0]
    if OUT:
        row = {
            "layout": layout, "free_bytes": free, "slots": slots, "weights_bytes": size,
            "expected_bytes": found.weights + slots * found.per_slot,
            "reserved_bytes": torch.cuda.max_memory_reserved(), "left_bytes": left,
            "device": torch.cuda.get_device_name(),
        }  # fmt: skip
        (Path(OUT) / f"serving_memory_{layout}.json").write_text(json.dumps(row, indent=1))
    engine.close()
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    assert slots >= 8
