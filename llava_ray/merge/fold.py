"""The merge itself, as a Ray task.

In fp32, because merging in bf16 or fp16 rounds small LoRA updates away.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.artifacts.records import AdapterCheckpoint, DatasetRecord, MergedModel
from llava_ray.artifacts.store import ArtifactStore, local_folder, read_record
from llava_ray.config.run import RunConfig
from llava_ray.errors import ArtifactError
from llava_ray.merge.beside import carry, pixel_differences
from llava_ray.models.chat_template import base_tokenizer
from llava_ray.models.conversation import encode_with_images
from llava_ray.models.dataset import open_split
from llava_ray.models.family import family_of
from llava_ray.models.folder import model_folder, weights_sha256
from llava_ray.models.low_bits import fake_quantize_base
from llava_ray.models.tensors import stored_bytes
from llava_ray.resources.devices import device_name
from llava_ray.resources.memory import peak_bytes, reset_peaks

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def merge_task(
    config: RunConfig, adapter: AdapterCheckpoint, id: str, storage_uri: str
) -> MergedModel:
    """Merge, compare logits before and after, and write a plain Hugging Face folder."""
    import torch

    base = model_folder(config.model)
    _check_base(config.model.path, base, adapter)
    store = ArtifactStore(storage_uri)
    settings = config.merge.model_dump(mode="json")
    with (
        torch.inference_mode(),
        store.build(MergedModel, id, settings=settings, parents=[adapter.id]) as build,
    ):
        if build.found:
            return build.found
        device = _device(base)
        reset_peaks(device)
        dataset = read_record(DatasetRecord, adapter.dataset_uri)
        probe = list(_probe(config, dataset, base, device))
        adapted = adapted_model(base, local_folder(adapter), device, hqq=hqq_of(adapter))
        before = [_logits(adapted, inputs) for inputs in probe]
        logger.info("merge: folding the adapter in")
        merged = adapted.merge_and_unload() if hasattr(adapted, "peft_config") else adapted
        exact = _differences(merged, probe, before)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        merged.to(dtype[config.merge.dtype]).save_pretrained(build.folder)
        rounded = _differences(merged.float(), probe, before)
        if not math.isfinite(rounded[0]):
            raise ArtifactError(
                f"merge.dtype={config.merge.dtype} cannot hold the merged weights, whose logits "
                "are no numbers then: set merge.dtype=bf16"
            )
        carry(base, build.folder)
        return build.finish(
            MergedModel,
            device=device_name(device),
            base_model=config.model.path,
            base_model_sha256=adapter.base_model_sha256,
            max_logit_difference=exact[0],
            mean_logit_difference=exact[1],
            rounded_max_logit_difference=rounded[0],
            pixel_differences=pixel_differences(build.folder),
            peak_memory_bytes=peak_bytes(device),
        )


def hqq_of(adapter: AdapterCheckpoint) -> tuple[int, int] | None:
    """Return bits and group size of the low-bit base that an adapter was trained over, if any."""
    train = adapter.settings.get("train", {})
    if train.get("method") != "hqq":
        return None
    return train["hqq_bits"], train["hqq_group_size"]


def _device(base: Path) -> str:
    """Take the task's GPU where the model fits on it in fp32, with a quarter for the rest."""
    import torch

    weights = stored_bytes(base) // 2
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.25 * 4 * weights
    return "cuda" if fits else "cpu"


def adapted_model(
    base: Path, adapter: Path, device: str = "cpu", *, hqq: tuple[int, int] | None = None
) -> Any:
    """Return the base in fp32 with the trained weights over it, not merged yet.

    Under an adapter that was trained over a low-bit base the base is rounded likewise: LoRA makes
    up for that rounding, and would spoil a base without it.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, device_map={"": device}
    )
    if hqq is not None:
        fake_quantize_base(model, bits=hqq[0], group_size=hqq[1])
    for name in (AdapterCheckpoint.projector_file, AdapterCheckpoint.language_model_file):
        if (adapter / name).is_file():
            _, unexpected = model.load_state_dict(load_file(adapter / name), strict=False)
            if unexpected:
                raise ArtifactError(
                    f"{adapter / name}: the base model has no weight {unexpected[0]!r}"
                )
    if (adapter / AdapterCheckpoint.peft_folder).is_dir():
        model = PeftModel.from_pretrained(
            model, adapter / AdapterCheckpoint.peft_folder, torch_device=device
        )
    return model.eval()


def _check_base(path: str, base: Path, adapter: AdapterCheckpoint) -> None:
    found, expected = weights_sha256(base), adapter.base_model_sha256
    if found != expected:
        raise ArtifactError(
            f"model.path {path!r} has weights {found[:12]}, but {adapter.id} was trained on "
            f"{expected[:12]} ({adapter.base_model}): train again, or set model.path and "
            "model.revision to that base"
        )


def _probe(
    config: RunConfig, dataset: DatasetRecord, base: Path, device: str
) -> Iterator[dict[str, "torch.Tensor"]]:
    """Give the first held-out samples (training ones where none is held out) as model inputs."""
    import torch

    tokenizer, family = base_tokenizer(base), family_of(base)
    firsts = (
        open_split(dataset, name).first(config.merge.probe_samples) for name in ("test", "train")
    )
    for sample in next(filter(None, firsts), []):
        encoded, images = encode_with_images(
            tokenizer, sample, family, max_length=max(2048, 2 * family.max_image_tokens),
            max_pixels=config.data.max_image_pixels, system=config.model.system_prompt,
        )  # fmt: skip
        found = {"input_ids": torch.tensor([encoded.input_ids], device=device)}
        yield found | (family.inputs(images, device) if images else {})


def _logits(model: Any, inputs: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def _differences(
    model: Any, probe: list[dict[str, "torch.Tensor"]], before: list["torch.Tensor"]
) -> tuple[float, float]:
    """Return the largest and the mean |difference| of logits over the probe."""
    gaps = [(_logits(model, inputs) - old).abs() for inputs, old in zip(probe, before, strict=True)]
    count = sum(gap.numel() for gap in gaps)
    return max(float(gap.max()) for gap in gaps), sum(float(gap.sum()) for gap in gaps) / count
