"""Memory estimates against the article's figures, real models and a measured run."""

import json
from pathlib import Path

import pytest

from llava_ray.config.run import ModelConfig, TrainConfig, load_config
from llava_ray.errors import ConfigError
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.shapes import LLAVA_7B, TINY, random_model
from llava_ray.models.sizes import Sizes
from llava_ray.train.adapt import adapt
from llava_ray.train.estimate import (
    default_load,
    estimate,
    run,
    shapes_of,
    trained_weights,
)

ARTICLE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def test_the_articles_parameters_and_bytes() -> None:
    sizes = Sizes.of(LLAVA_7B)
    assert sizes.total() == 7_063_427_072
    assert round(sizes.total() * (8 + 4 + 4) / 2**30, 2) == 105.25
    # the article halves the rounded 105.25
    assert sizes.total() * 8 / 2**30 == pytest.approx(105.25 / 2, abs=0.002)


def test_the_articles_trainable_parameters() -> None:
    sizes = Sizes.of(LLAVA_7B)
    lora = sizes.lora(8, ARTICLE_TARGETS, in_vision_tower=True)
    assert (lora, sizes.total() + lora) == (17_301_504, 7_080_728_576)
    assert int(1e6 * lora / (sizes.total() + lora)) == 2443


@pytest.mark.parametrize("tree", [TINY, json.loads((EMBEDDED / "config.json").read_text())])
def test_counts_are_those_of_the_model(tree: dict[str, object]) -> None:
    import torch

    sizes = Sizes.of(tree)
    model = random_model(tree, "cpu", torch.float32)
    assert sum(p.numel() for p in model.parameters()) == sizes.total()
    train = TrainConfig(lora_r=8, lora_targets=("q_proj", "up_proj"))
    adapted = adapt(model, train)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == trained_weights(sizes, train)


def test_each_saving_lowers_what_it_should() -> None:
    sizes = Sizes.of(LLAVA_7B)

    def of(workers: int = 1, **changes: object) -> object:
        train = TrainConfig.model_validate({"precision": "bf16", "batch_size": 4, **changes})
        return estimate(sizes, train, workers=workers, load=default_load(sizes, train))

    base = of()
    assert (
        of(gradient_checkpointing=True).activations < of(gradient_checkpointing="mlp").activations
    )
    assert of(gradient_checkpointing="mlp").activations < base.activations
    assert of(fused_layers=False).activations > 1.5 * base.activations
    assert of(workers=4, zero_stage=2).optimizer == base.optimizer / 4
    assert of(workers=4, zero_stage=2).weights == base.weights
    assert of(optimizer="adamw8bit", zero_stage=0).optimizer < base.optimizer / 4
    assert of(workers=4, zero_stage=3).weights == pytest.approx(base.weights / 4)
    assert of(method="qlora").weights < 0.4 * base.weights
    assert of(precision="fp32").weights == 2 * base.weights
    assert of(lora_r=24).optimizer < base.optimizer
    offloaded = of(offload="optimizer")
    assert offloaded.optimizer == 0
    assert offloaded.host == base.optimizer + base.gradients
    assert offloaded.weights == base.weights
    assert of(zero_stage=3, offload="optimizer+weights").weights == 0


def test_a_model_that_is_not_here_is_refused_unless_its_shapes_are_known() -> None:
    assert shapes_of(ModelConfig(path="llava-hf/llava-1.5-7b-hf")) is LLAVA_7B
    with pytest.raises(ConfigError, match="no config.json there"):
        shapes_of(ModelConfig(path="nobody/nothing"))


def test_table_names_the_figures() -> None:
    config = load_config(
        None,
        ["model.path=llava-hf/llava-1.5-7b-hf", "train.lora_r=8",
         f"train.lora_targets=[{','.join(ARTICLE_TARGETS)}]"],
    )  # fmt: skip
    table = run(config, workers=2)
    assert "7,063,427,072" in table
    assert "17,301,504 of 7,080,728,576" in table
    assert "105.25 GiB" in table


def test_peaks_that_an_h100_showed_are_met_within_a_tenth() -> None:
    tree = json.loads(Path("jobs/results/train_h100.json").read_text())
    stages = {"replica": 0, "zero2": 2, "zero3": 3}
    sizes, checked = Sizes.of(LLAVA_7B), 0
    for row in tree["rows"]:
        if row["failed"] or not row["peak_bytes"] or row["engine"] not in stages:
            continue
        settings = {
            "precision": "bf16", "batch_size": row["batch"], "lora_r": 48,
            "lora_dropout": row["lora_dropout"], "gradient_checkpointing": row["checkpointing"],
            "fused_layers": row["fused_layers"], "zero_stage": stages[row["engine"]],
        }  # fmt: skip
        train, load = TrainConfig.model_validate(settings), tree["tokens"]
        estimated = estimate(sizes, train, workers=row["gpus"], load=load).gpu
        assert estimated == pytest.approx(row["peak_bytes"], rel=0.1), row["name"]
        checked += 1
    assert checked >= 4
