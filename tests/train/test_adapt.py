"""What is trained of the base model, and in which dtype."""

from pathlib import Path

import torch
from tiny_run import small_model

from llava_ray.config.run import TrainConfig
from llava_ray.train import adapt


def test_zero3_gets_trained_weights_of_one_dtype(tmp_path: Path) -> None:
    """DeepSpeed packs a parameter group's shards into one buffer and fails on two dtypes."""
    folder = small_model(tmp_path / "model")
    base = adapt.load_base(folder, dtype=torch.bfloat16, device="cpu")
    model = adapt.adapt(base, TrainConfig(zero_stage=3, lora_r=4, lora_alpha=8))
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert {adapt.PROJECTOR in name for name in trained} == {True, False}
    assert set(trained.values()) == {torch.bfloat16}
