"""Merging on a small model, without training: the adapter is made by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import config_for, small_model, squares

from llava_ray import merge
from llava_ray.artifacts.records import AdapterCheckpoint, DatasetRecord
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.errors import ArtifactError
from llava_ray.merge.fold import adapted_model
from llava_ray.models.folder import weights_sha256


def make_adapter(storage: Path, model: Path, dataset: DatasetRecord) -> AdapterCheckpoint:
    """Write a LoRA whose update is large enough to see, and a changed projector."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    base = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    projector = {
        name: value + 0.1 for name, value in base.state_dict().items() if "projector" in name
    }
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=r".*language_model\..*\.(q_proj|down_proj)")
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    store = ArtifactStore(str(storage))
    with store.build(AdapterCheckpoint, "adapter-made", settings={}) as build:
        adapted.save_pretrained(build.folder / "adapter", save_embedding_layers=False)
        save_file(projector, build.folder / "projector.safetensors")
        return build.finish(
            AdapterCheckpoint, device="cpu", base_model=str(model),
            base_model_sha256=weights_sha256(model), dataset_uri=dataset.uri, steps=1,
            train_loss=1.0, eval_loss=None, samples_per_s=1.0, num_workers=1,
        )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, AdapterCheckpoint]:
    root = tmp_path_factory.mktemp("merge")
    model = small_model(root / "model")
    dataset = squares(root / "store", num_train=4, num_test=3)
    return root, model, make_adapter(root / "store", model, dataset)


def test_merged_folder_speaks_like_base_with_adapter(
    ray_local: None, made: tuple[Path, Path, AdapterCheckpoint]
) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    root, model, adapter = made
    config = config_for(root / "store", model, "merge.dtype=fp16")
    record = merge.run(config, adapter)
    folder = local_folder(record)
    inputs = {
        "input_ids": torch.tensor([[1, *[1022] * 4, 40, 50, 60]]),
        "pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32),
    }
    with torch.inference_mode():
        expected = adapted_model(model, local_folder(adapter))(**inputs).logits
        plain = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        merged = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        found, untouched = merged(**inputs).logits, plain(**inputs).logits
    assert (untouched - expected).abs().max() > 0.05
    assert (found - expected).abs().max() < 5e-3
    assert 0 < record.max_logit_difference < 1e-4
    assert record.mean_logit_difference <= record.max_logit_difference
    assert record.max_logit_difference < record.rounded_max_logit_difference < 5e-3
    # E1
    assert record.pixel_differences.keys() == {"wide", "tall", "tiny", "square", "grey"}
    assert max(record.pixel_differences.values()) <= 1
    assert (folder / "generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(folder)("<image>")["input_ids"][-1] == 1022
    assert merge.run(config, adapter).created == record.created


def test_another_base_is_refused(
    ray_local: None, made: tuple[Path, Path, AdapterCheckpoint], tmp_path: Path
) -> None:
    root, _, adapter = made
    other = small_model(tmp_path / "other")
    save_file({"second": torch.zeros(1)}, other / "second.safetensors")
    with pytest.raises(ArtifactError, match="was trained on"):
        merge.run(config_for(root / "store", other, "merge.dtype=bf16"), adapter)
