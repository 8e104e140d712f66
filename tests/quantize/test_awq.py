"""AWQ's layout and loader; what AutoAWQ itself makes is in the slow contract test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantize_inputs import NO_CALIBRATION, TINY, packed_by_awq, probe_logits

from llava_ray.errors import VariantError
from llava_ray.inference.torch.kernels.weights import read_module
from llava_ray.inference.torch.kernels.weights import unpack as unpack_weight
from llava_ray.models import tensors as llava_folder
from llava_ray.quantize.awq import AwqSpec
from llava_ray.quantize.awq_linear import AwqLinear, pack, unpack
from llava_ray.quantize.registry import spec_for

# Written by AutoAWQ 0.2.9: WQLinear_GEMM.from_linear and dequantize_gemm of a random 32x64
# weight in groups of 32.
GOLDEN = json.loads((Path(__file__).parent / "awq_golden.json").read_text())


def golden(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64).to(dtype)


def test_tensors_of_autoawq_are_read_to_the_same_weights() -> None:
    linear = AwqLinear(
        golden("qweight", torch.int32),
        golden("qzeros", torch.int32),
        golden("scales", torch.float16),
    )
    assert (linear.in_features, linear.out_features, linear.group_size) == (64, 32, 32)
    expected = golden("dequantized", torch.float16)
    assert torch.equal(linear.dequantize(torch.float16), expected.T)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(linear(x), x @ expected.float(), atol=1e-2)


def test_a_gpus_layout_stands_for_the_same_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    steps, zeros = (torch.randint(0, 16, (n, 64), generator=draw) for n in (256, 4))
    scales = torch.rand(4, 64, generator=draw).half()
    linear = AwqLinear(pack(steps), pack(zeros), scales)
    read = unpack_weight(read_module(linear), torch.float32)
    assert torch.equal(read, linear.dequantize(torch.float32))


def test_pack_is_the_inverse_of_unpack_and_gives_autoawqs_words() -> None:
    words = golden("qweight", torch.int32)
    assert words.min() < 0 < words.max()
    steps = unpack(words)
    assert steps.min() == 0
    assert steps.max() == 15
    assert torch.equal(pack(steps), words)


def test_a_checkpoint_runs_as_its_dequantized_weights_do(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    rounded = packed_by_awq(tmp_path, 64)
    reference = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    for module, value in rounded.items():
        if spec_for("awq-w4-g64").quantizes(module):
            reference.get_submodule(module).weight.data = value
    model = spec_for("awq-w4-g64").load(tmp_path, "cpu")
    kinds = [type(child).__name__ for child in model.modules()]
    assert kinds.count("AwqLinear") == 6 * 7
    assert torch.allclose(probe_logits(model), probe_logits(reference), atol=1e-5)


@pytest.mark.parametrize(
    ("slug", "group", "zero_point", "images"),
    [
        ("awq-w4-g128", 128, True, True),
        ("awq-w4-g64-text", 64, True, False),
        ("awq-w4-g32-sym-text", 32, False, False),
    ],
)
def test_slugs_say_group_zero_point_and_calibration(
    slug: str, group: int, zero_point: bool, images: bool
) -> None:
    assert spec_for(slug) == AwqSpec(slug, group, zero_point, images)


def test_transformers_reads_the_layout_from_the_config() -> None:
    from transformers import AwqConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    tree = spec_for("awq-w4-g64-sym").quantization_config()
    read = AutoQuantizationConfig.from_dict(dict(tree))
    assert isinstance(read, AwqConfig)
    assert (read.bits, read.group_size, read.zero_point) == (4, 64, True)
    assert str(read.format) in ("gemm", "AwqFormat.GEMM")
    # vLLM skips a module where one of these is a part of its name.
    skipped = read.modules_to_not_convert
    for name in llava_folder.weight_shapes(TINY):
        module = llava_folder.module_name(name.removesuffix(".weight"))
        if len(llava_folder.weight_shapes(TINY)[name]) == 2 and "embed" not in module:
            kept = any(part in module for part in skipped)
            assert kept != spec_for("awq-w4-g64-sym").quantizes(module), module


def test_rows_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    from safetensors.torch import save_file

    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({name: torch.zeros(64, 96)}, tmp_path / "model.safetensors")
    with pytest.raises(VariantError, match=r"up_proj\.weight is 64x96; rows must divide by 128"):
        spec_for("awq-w4-g128").quantize(tmp_path, tmp_path, NO_CALIBRATION, "cpu")
