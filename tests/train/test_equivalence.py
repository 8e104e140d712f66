"""What the distributed loop computes is what plain transformers and peft compute."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ray.artifacts.storage import Storage
from llava_ray.train.adapt import lora_pattern
from llava_ray.train.batches import CaptionSamples, StreamOrder
from llava_ray.train.trackers import read_metrics

TOLERANCE = 2e-5
"""Of losses and gradients, whose fp32 sums are taken in another order: relative to the largest
entry of each tensor."""

BF16_TOLERANCE = 5e-3
"""Of losses: bf16 has 8 bits."""

WEIGHT_TOLERANCE = 2e-5
"""Absolute, at a learning rate of 1e-2: AdamW divides by the gradient's size, so an entry whose
gradient is all rounding moves by up to the rate's 500th part."""


RESUME_TOLERANCE = {"two_long": 0, "two_8bit": 0, "two_galore": 1e-4}
"""GaLore's projection is read back in another memory layout, which products round differently."""


def read_step(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by `<kind>/<name>`, of all ranks together."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (run / f"step_{step}").glob("state_*.safetensors"):
        tensors |= load_file(path)
    return {name.replace("/model.", "/", 1): value for name, value in tensors.items()}


def losses(run: Path, step: int = 3) -> list[float]:
    return [x["loss"] for x in read_metrics(run / f"step_{step}" / "metrics.jsonl") if "loss" in x]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare trained weights."""
    assert found.keys() == expected.keys()
    gaps = {n: float((found[n].view_as(v) - v).abs().max()) for n, v in expected.items()}
    assert max(gaps.values()) <= WEIGHT_TOLERANCE, max(gaps, key=lambda name: gaps[name])


def assert_gradients_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gap = float((found[name].view_as(value) - value).abs().max())
        assert gap <= TOLERANCE * float(value.abs().max()) + 1e-9, name


Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def plain(bench) -> Trained:
    return train_plainly(bench.model, Path(bench.dataset.uri), steps=3, by_length=True)


@pytest.fixture(scope="module")
def plain_mixed(bench) -> Trained:
    return train_plainly(bench.model, Path(bench.mixed.uri), steps=4, by_length=False)


def train_plainly(base: Path, data: Path, *, steps: int, by_length: bool) -> Trained:
    """Train with transformers' own loss, peft and torch's AdamW alone.

    Return the losses, the first step's gradients and the weights.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from llava_ray.models.dataset import Split
    from llava_ray.models.family import family_of

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_pattern(targets))
    )
    projector, lora = [], []
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
            projector.append(parameter)
        elif "lora_" in name:
            lora.append(parameter)
    groups = [{"params": lora, "lr": 1e-2}, {"params": projector, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    samples = CaptionSamples(
        Split(Storage(str(data)), "train"),
        AutoTokenizer.from_pretrained(base), family_of(base), 2048, 10**6, "",
    )  # fmt: skip
    order = StreamOrder(tuple(samples.split.letters.tolist()), seed=0, group=2, by_length=by_length)
    found, gradients = [], {}
    for step in range(steps):
        batch = samples.collate([samples[order.at(2 * step + i)] for i in range(2)])
        if not (batch["input_ids"] == samples.family.vision.image_token_id).any():
            del batch["pixel_values"]
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return found, gradients, weights


@pytest.mark.parametrize("run", ["one_zero2", "one_zero3", "two_zero2", "two_zero3", "two_stage0"])
def test_steps_equal_plain_transformers_and_peft(runs, plain, run: str) -> None:
    expected_losses, gradients, weights = plain
    assert losses(runs / run) == pytest.approx(expected_losses, rel=TOLERANCE)
    first = read_step(runs / run, 1)
    found = {n.removeprefix("exp_avg/"): 10 * v for n, v in first.items() if "exp_avg/" in n}
    assert_gradients_close(found, gradients)
    last = read_step(runs / run, 3)
    assert_close({n.removeprefix("weight/"): v for n, v in last.items() if "weight/" in n}, weights)
    assert expected_losses[2] < expected_losses[0]


@pytest.mark.parametrize("run", ["two_mixed2", "two_mixed3", "two_mixed0"])
def test_text_alone_several_pictures_and_turns_train_together(runs, plain_mixed, run: str) -> None:
    """C10"""
    expected_losses, gradients, weights = plain_mixed
    assert losses(runs / run, 4) == pytest.approx(expected_losses, rel=TOLERANCE)
    first = read_step(runs / run, 1)
    found = {n.removeprefix("exp_avg/"): 10 * v for n, v in first.items() if "exp_avg/" in n}
    assert_gradients_close(found, gradients)
    last = read_step(runs / run, 4)
    assert_close({n.removeprefix("weight/"): v for n, v in last.items() if "weight/" in n}, weights)


@pytest.mark.parametrize("run", ["one_dropout", "one_dropout_zero3"])
def test_dropout_changes_the_steps(runs, plain, run: str) -> None:
    expected, _, _ = plain
    found = losses(runs / run)
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)  # LoRA's B is still zero.
    assert found[1] != pytest.approx(expected[1], rel=10 * TOLERANCE)


def test_vision_tower_is_never_trained(plain) -> None:
    _, gradients, _ = plain
    assert not [name for name in gradients if "vision_tower" in name]
    assert len([name for name in gradients if "projector" in name]) == 4


@pytest.mark.parametrize("run", ["two_long", "two_8bit", "two_galore"])
def test_resume_equals_the_uninterrupted_run(runs, run: str) -> None:
    whole, resumed = runs / run, runs / f"{run.removesuffix('_long')}_resumed"
    for name in ("loss", "lr", "projector_lr", "grad_norm", "tokens"):
        lines = [read_metrics(run / "step_4" / "metrics.jsonl") for run in (whole, resumed)]
        of_whole, of_resumed = ([x[name] for x in part if name in x] for part in lines)
        assert of_resumed == pytest.approx(of_whole, rel=RESUME_TOLERANCE[run]), name
        assert len(of_whole) == 4
    expected, found = read_step(whole, 4), read_step(resumed, 4)
    for name, value in expected.items():
        gap = float((found[name].float() - value.float()).abs().max())
        assert gap <= RESUME_TOLERANCE[run] * float(value.float().abs().max()), name
    states = [json.loads((r / "step_4" / "state.json").read_text()) for r in (whole, resumed)]
    assert states[0]["samples"] == states[1]["samples"] == 4 * 2 * 2


def test_8bit_and_galore_keep_small_states(runs) -> None:
    eight_bit, galore = (read_step(runs / run, 4) for run in ("two_8bit", "two_galore"))
    name = next(n for n in eight_bit if n.startswith("weight/") and "layers.0.mlp.up_proj" in n)
    name = name.removeprefix("weight/")
    shape = eight_bit[f"weight/{name}"].shape
    assert eight_bit[f"state1/{name}"].dtype == torch.uint8
    assert eight_bit[f"state1/{name}"].shape == shape
    assert galore[f"exp_avg/{name}"].numel() == 4 * max(shape)
    assert galore[f"ortho_matrix/{name}"].numel() == 4 * min(shape)
    for run in ("two_8bit", "two_galore"):
        found = losses(runs / run, 4)
        assert found[3] < found[0]


def test_bf16_steps_are_taken_in_fp32(runs, plain) -> None:
    expected_losses, _, _ = plain
    assert losses(runs / "one_bf16") == pytest.approx(expected_losses, rel=BF16_TOLERANCE)
    last, again = (read_step(runs / run, 3) for run in ("one_bf16", "one_bf16_resumed"))
    assert all(torch.equal(again[name], value) for name, value in last.items())
    weight = next(v for n, v in last.items() if n.startswith("weight/") and "lora_B" in n)
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("run", ["one_from_two", "one_stage0_from_two", "one_zero2_from_stage0"])
def test_resume_with_other_workers_and_stage(runs, plain, run: str) -> None:
    _, _, weights = plain
    last = read_step(runs / run, 3)
    assert_close({n.removeprefix("weight/"): v for n, v in last.items() if "weight/" in n}, weights)
    assert losses(runs / run) == pytest.approx(losses(runs / "two_zero2"), rel=1e-4)


def test_adapter_opens_with_peft(runs, bench, plain) -> None:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    _, _, weights = plain
    folder = runs / "two_zero3" / "step_3" / "artifact"
    base = LlavaForConditionalGeneration.from_pretrained(bench.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    lora = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert_close(lora, {n: v for n, v in weights.items() if "lora_" in n})
    projector = load_file(folder / "projector.safetensors")
    assert set(projector) <= set(base.state_dict())
    expected = {n.removeprefix("base_model.model."): v for n, v in weights.items() if "proj" in n}
    assert_close(projector, {n: v for n, v in expected.items() if "multi_modal" in n})
