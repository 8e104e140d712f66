"""What a new part touches: a toy one, added to a copy of the package, runs the whole line."""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny_run import small_model, squares

METHOD = '''
"""Every weight rounded to a multiple of 1/256."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from llava_ray.models import tensors
from llava_ray.quantize.spec import Calibration, QuantizationSpec, Resources


@dataclass(frozen=True)
class ToySpec(QuantizationSpec):
    method: ClassVar[str] = "toy"

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        return cls(slug) if slug == "toy" else None

    @classmethod
    def known_slugs(cls) -> tuple[str, ...]:
        return ("toy",)

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        return Resources()

    def bits_per_weight(self) -> float:
        return 32

    def other_bits_per_weight(self) -> float:
        return 32

    def quantize(self, merged: Path, out: Path, calibration: Calibration, device: str) -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(merged, out, dirs_exist_ok=True)
        for path in out.glob("*.safetensors"):
            weights = {key: (w.float() * 256).round() / 256 for key, w in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})

    def open_engine(self, folder: Path, *, device: str, slots: int, context: int) -> Any:
        import torch

        from llava_ray.inference.torch.engine import TorchEngine

        model = tensors.empty_model(folder)
        tensors.fill_model(model, folder, device, torch.float32)
        return TorchEngine(model, folder=folder, device=device, slots=slots, context=context)
'''


def test_a_quantization_method_is_one_file_and_two_lines(tmp_path: Path) -> None:
    package = tmp_path / "package" / "llava_ray"
    shutil.copytree("llava_ray", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "quantize" / "toy.py").write_text(METHOD)
    registry = package / "quantize" / "registry.py"
    before = registry.read_text()
    after = before.replace(
        "from llava_ray.quantize.spec import",
        "from llava_ray.quantize.toy import ToySpec\nfrom llava_ray.quantize.spec import",
    ).replace("    AwqSpec,\n", "    AwqSpec,\n    ToySpec,\n")
    registry.write_text(after)
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines())]
    assert [line for line in changed if line[0] in "+-"] == [
        "+ from llava_ray.quantize.toy import ToySpec", "+     ToySpec,",
    ]  # fmt: skip

    chosen = _run_line(tmp_path, package.parent, "quantize.variants=[none-fp32, toy]")
    assert chosen["slug"] == "toy"


def _run_line(tmp_path: Path, package: Path, *overrides: str) -> dict[str, object]:
    """Run the line up to the choice on a CPU, and return the choice's manifest."""
    storage = tmp_path / "runs"
    data = Path(squares(tmp_path / "squares").uri)
    done = subprocess.run(
        [
            sys.executable, "jobs/choose.py", f"storage.uri={storage}",
            f"data.source={data / 'train.json'}", f"data.images={data / 'images'}",
            f"model.path={small_model(tmp_path / 'model')}", "train.max_steps=1",
            "train.num_workers=1", "train.cpus_per_worker=1", "benchmark.baseline=none-fp32",
            "benchmark.fidelity_samples=2", "benchmark.caption_samples=2",
            "benchmark.decode_tokens=4", "benchmark.max_new_tokens=4", *overrides,
        ],
        env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(done.stdout.splitlines()[-1])
    manifest: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    return manifest
