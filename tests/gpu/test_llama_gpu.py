"""llama.cpp with its layers and its image encoder on a GPU gives what the CPU gives."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import random_picture

from llava_ray.inference.engine import Prompt
from llava_ray.models import tensors as llava_folder
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.gguf_writer import write_pair

llama_cpp = pytest.importorskip("llama_cpp", reason="needs 'pip install llava_ray[gguf]'")
pytestmark = pytest.mark.skipif(
    not llama_cpp.llama_supports_gpu_offload(), reason="llama-cpp-python was built for the CPU"
)


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_offloaded_layers_score_as_the_cpu_does(precision: str, tmp_path: Path) -> None:
    from llava_ray.inference.llama_cpp.engine import LlamaCppEngine

    llava_folder.copy_sidecars(EMBEDDED, tmp_path)
    shutil.copyfile(EMBEDDED / "config.json", tmp_path / "config.json")
    names = tmp_path / "llava.gguf", tmp_path / "mmproj-llava.gguf"
    write_pair(EMBEDDED, *names, precision=precision)
    rows = []
    for device in ("cpu", "cuda"):
        engine = LlamaCppEngine(tmp_path, device=device, slots=2, context=512)
        assert engine.offloaded == (device == "cuda")
        picture = random_picture(engine, np.random.default_rng(0))
        ids = engine.tokenizer("USER: " + "<image>" * picture.num_tokens)["input_ids"]
        rows.append(engine.score(Prompt(tuple(ids), (picture,)), [40, 41, 42]))
        engine.close()
    # cuBLAS may multiply in TF32.
    torch.testing.assert_close(rows[0], rows[1], atol=1e-2, rtol=0)
