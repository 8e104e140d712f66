"""A base in HQQ's low bits: packed for training, and as the values that stand for it in a merge."""

from pathlib import Path

import pytest
import torch
from tiny_run import small_model

from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.models.low_bits import dequantize_base, round_base
from llava_ray.train import adapt

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("low_bits") / "model")


def load(folder: Path) -> torch.nn.Module:
    return adapt.load_base(folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("bits", [4, 2])
def test_a_merge_rounds_the_base_as_training_did(folder: Path, bits: int) -> None:
    packed, values, whole = load(folder), load(folder), load(folder)
    round_base(packed, bits=bits, group_size=64)
    dequantize_base(values, bits=bits, group_size=64)
    with torch.no_grad():
        found, expected, exact = (m(input_ids=IDS).logits for m in (packed, values, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - exact).abs().max()) > 1e-3


def test_only_lora_over_it_and_the_projector_are_trained(folder: Path) -> None:
    model = load(folder)
    round_base(model, bits=2, group_size=64)
    adapted = adapt.adapt(model, TrainConfig(method="hqq", lora_r=4))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)


def test_groups_that_do_not_divide_a_layer_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"hqq_group_size=256: .*use a smaller group"):
        round_base(load(folder), bits=4, group_size=256)
