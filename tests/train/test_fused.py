"""The layers with a backward of their own give what peft's modules give, and keep less."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import small_model

from llava_ray.config.run import TrainConfig
from llava_ray.train import adapt
from llava_ray.train.pointwise import dropout_mask

TOLERANCE = 1e-5
"""Of gradients, relative to each tensor's largest entry: fp32 sums in another order."""

STEP = 1e-2
"""Large enough to show in an fp32 loss."""

IMAGE, ANSWER = slice(1, 5), 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("fused") / "model")


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two samples of unlike lengths."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 900, (2, 12), generator=draw)
    ids[:, IMAGE] = 1022
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :ANSWER] = -100
    ids[0, 9:], mask[0, 9:], labels[0, 9:] = 1023, 0, -100
    pixels = torch.randn(2, 3, 32, 32, generator=draw)
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels,
    }  # fmt: skip


def make(folder: Path, **changes: Any) -> torch.nn.Module:
    train = TrainConfig(lora_r=4, lora_alpha=8, **{"lora_dropout": 0, **changes})
    torch.manual_seed(0)
    model = adapt.adapt(adapt.load_base(folder, dtype=torch.float32, device="cpu"), train)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return adapt.loss_module(model, train).train()


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= TOLERANCE * float(value.abs().max())


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("q_proj", "v_proj", "up_proj"),
        ("k_proj",),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, "mlp", True])
def test_loss_and_gradients_equal_transformers_and_peft(
    folder: Path, batch: dict[str, torch.Tensor], targets: tuple[str, ...], checkpointing: Any
) -> None:
    module = make(folder, lora_targets=targets, gradient_checkpointing=checkpointing)
    assert module.decoder is not None
    count = (batch["labels"][:, 1:] != -100).sum()
    # gradient checkpointing of transformers itself would hide a mistake of the loss module's
    plain = make(folder, lora_targets=targets, fused_layers=False)
    assert plain.decoder is None
    theirs = plain.model(**batch).loss * count
    expected = gradients(plain, theirs)
    loss = module(**batch)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_equal(gradients(module, loss), expected)


def test_dropout_is_drawn_again_in_backward(folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """With the mask of forward the gradient is that of the loss, as small steps show it."""
    module = make(folder, lora_dropout=0.3)
    found: dict[str, torch.Tensor] = {}
    for checkpointing in ("none", "mlp", "layer"):
        for layer in module.decoder.layers:
            layer.recompute = checkpointing
        torch.manual_seed(5)
        found = gradients(module, module(**batch))
        for name in ("layers.0.self_attn.q_proj.lora_B", "layers.1.mlp.down_proj.lora_A"):
            weight = next(p for n, p in module.named_parameters() if name in n)
            gradient = next(g for n, g in found.items() if name in n)
            direction = gradient / gradient.norm()
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.add_(direction, alpha=sign * STEP)
                    torch.manual_seed(5)
                    values.append(module(**batch).item())
                    weight.sub_(direction, alpha=sign * STEP)
            assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(
                float(gradient.norm()), rel=0.02
            )
    torch.manual_seed(6)
    assert module(**batch).item() != pytest.approx(values[0], rel=1e-6)
    module.eval()
    assert module(**batch).item() == module(**batch).item()


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"method": "full"}, {"fused_layers": False}]
)
def test_other_ways_of_training_run_through_peft(folder: Path, changes: dict[str, Any]) -> None:
    assert make(folder, **changes).decoder is None


def test_a_dropout_mask_keeps_its_rate_and_its_seed() -> None:
    x = torch.empty(300, 255, dtype=torch.bfloat16)
    mask = dropout_mask(x, 0.05, seed=3)
    assert mask.shape == x.shape and mask.dtype == x.dtype
    assert torch.equal(mask, dropout_mask(x, 0.05, seed=3))
    assert not torch.equal(mask, dropout_mask(x, 0.05, seed=4))
    kept = mask[mask != 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / 0.95))
    assert len(kept) / x.numel() == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / x.numel()))
