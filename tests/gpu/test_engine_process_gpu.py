"""An engine's process on a GPU is gone with its memory soon after the one that started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llava_ray.artifacts.records import Variant  # noqa: E402
from llava_ray.artifacts.store import ArtifactStore  # noqa: E402
from llava_ray.models.folder import EMBEDDED  # noqa: E402
from llava_ray.quantize.registry import spec_for  # noqa: E402
from llava_ray.quantize.spec import Calibration  # noqa: E402
from llava_ray.server.settings import EngineArgs  # noqa: E402


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_parent_frees_the_gpu_in_5_s(stopped: bool, tmp_path: Path) -> None:
    import signal

    spec = spec_for("none-fp16")
    with ArtifactStore(str(tmp_path)).build(Variant, "variant-gpu", settings={}) as build:
        spec.quantize(EMBEDDED, build.folder, Calibration("", 0), "cuda")
        variant = build.finish(
            Variant, device="cuda", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=1.0, peak_memory_bytes=1,
        )  # fmt: skip
    args = EngineArgs(
        name="gpu", variant_uri=variant.uri, device="cuda", slots=64, context=2048, kept_prefixes=0
    ).model_dump_json()
    lines = (
        "import asyncio",
        "from llava_ray.inference.process.client import EngineProcess",
        "async def main():",
        f"    words = 'gpu', 'llava_ray.server.loading', {args!r}",
        "    engine = EngineProcess(*words, step_timeout_s=60)",
        "    await engine.start()",
        "    print(engine._life.process.pid, flush=True)",
        "    await asyncio.sleep(1000)",
        "asyncio.run(main())",
    )
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        taken = free - torch.cuda.mem_get_info()[0]
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    start = time.monotonic()
    while free - torch.cuda.mem_get_info()[0] > taken / 10:
        assert time.monotonic() - start < 5
        time.sleep(0.05)
    print(f"{taken / 1e9:.2f} GB were free again after {time.monotonic() - start:.2f} s")
    assert taken > 10**8
