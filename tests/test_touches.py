"""What a change touches is counted: a toy method and a toy form of data, each added to a copy of
the package, run through the line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import COLOURS, small_model

import llava_ray

TOY_METHOD = '''
"""Weights rounded to bfloat16 and kept in float16."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from llava_ray.models import tensors
from llava_ray.quantize.spec import Calibration, QuantizationSpec, process_memory
from llava_ray.resources.capacity import Resources


@dataclass(frozen=True)
class ToySpec(QuantizationSpec):
    method: ClassVar[str] = "toy"
    known_slugs: ClassVar[tuple[str, ...]] = ("toy-w16",)

    @classmethod
    def parse(cls, slug: str) -> Self | None:
        return cls(slug) if slug == "toy-w16" else None

    def resources(self, model_bytes: int, *, gpu: bool) -> Resources:
        return Resources(memory_bytes=process_memory(model_bytes))

    def bits_per_weight(self) -> float:
        return 16

    def quantize(
        self, merged: Path, out: Path, calibration: Calibration, device: str
    ) -> None:
        tensors.rewrite(
            merged, out, dtype=torch.float16, device="cpu", quantizes=self.quantizes,
            pack=lambda name, weight: {"weight": weight.bfloat16().half()},
        )

    def load(self, folder: Path, device: str) -> Any:
        return tensors.load_model(folder, device)[0]
'''

TOY_READER = '''
"""Lines of `file name|caption`."""

from llava_ray.artifacts.store import sha256_of
from llava_ray.prepare.readers import Reader
from llava_ray.prepare.table import Table


def _open(path):
    rows = [dict(zip(("filename", "caption_condensed"), line.split("|")))
            for line in path.read_text().splitlines()]
    return Table(("filename", "caption_condensed"), len(rows), sha256_of(path),
                 lambda columns: iter(rows), path.parent)


READER = Reader(".bar", "lines of a file name, a bar and a caption", _open)
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Copy the package, to be changed."""
    copy = tmp_path / "package" / "llava_ray"
    source = Path(llava_ray.__file__).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run(package: Path, script: str, *arguments: str) -> Path:
    """Run a job script with the changed package; return the artifact that it names."""
    done = subprocess.run(
        [sys.executable, Path("jobs", f"{script}.py").absolute(), *arguments], cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(package.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.splitlines()[-1].split()[-1])


def test_a_quantization_method_and_a_form_of_data_touch_what_the_map_says(
    package: Path, tmp_path: Path
) -> None:
    (package / "quantize" / "toy.py").write_text(TOY_METHOD)
    registry = package / "quantize" / "registry.py"
    text = registry.read_text()
    added = {
        "from llava_ray.quantize.spec": "from llava_ray.quantize.toy import ToySpec\n",
        "    AwqSpec,\n": "    ToySpec,\n",
    }
    for before, line in added.items():
        text = text.replace(before, line + before, 1)
    registry.write_text(text)
    (package / "prepare" / "readers" / "bar.py").write_text(TOY_READER)

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for number, (left, right) in enumerate((a, b) for a in COLOURS for b in COLOURS):
        image = Image.new("RGB", (40, 30), COLOURS[left])
        image.paste(COLOURS[right], (20, 0, 40, 30))
        image.save(pictures / f"{number}.png")
        lines.append(f"{number}.png|{left} and {right}.")
    (pictures / "captions.bar").write_text("\n".join(lines))

    chosen = run(
        package, "choose", f"storage.uri={tmp_path / 'runs'}",
        f"model.path={small_model(tmp_path / 'model')}",
        f"data.source={pictures / 'captions.bar'}", "data.test_share=0.3", "train.max_steps=2",
        "train.lora_r=2", "train.cpus_per_worker=1", "quantize.variants=[none-fp16, toy-w16]",
        "benchmark.repeats=1", "benchmark.warmup=0", "benchmark.decode_tokens=4",
        "benchmark.max_new_tokens=8", "choose.max_kl_divergence=10",
    )  # fmt: skip
    record = json.loads((chosen / "manifest.json").read_text())
    assert record["slug"] == "toy-w16"
    assert not record["settings"]["failures"]
