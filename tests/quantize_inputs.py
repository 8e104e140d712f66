"""What the tests of quantization share: the tiny model's folder, probes and distances."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import random_picture

from llava_ray.artifacts.records import MergedModel
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models import tensors as llava_folder
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.awq_linear import pack
from llava_ray.quantize.spec import Calibration, QuantizationSpec

TINY = EMBEDDED
NO_CALIBRATION = Calibration(dataset_uri="", num_samples=0)


def quantized(spec: QuantizationSpec, out: Path) -> Path:
    """Write a variant that needs no calibration and return its folder."""
    out.mkdir(parents=True)
    spec.quantize(TINY, out, NO_CALIBRATION, "cpu")
    return out


def merged_record(store: ArtifactStore) -> MergedModel:
    """Return the tiny model as a finished artifact."""
    with store.build(MergedModel, "merged-0", settings={}) as build:
        shutil.copytree(TINY, build.folder, dirs_exist_ok=True)
        return build.finish(
            MergedModel,
            device="cpu",
            base_model="embedded",
            base_model_sha256="0" * 64,
            max_logit_difference=0.0,
            mean_logit_difference=0.0,
            rounded_max_logit_difference=0.0,
        )


def packed_by_awq(out: Path, group: int) -> dict[str, torch.Tensor]:
    """Round the tiny model by hand, write it as AutoAWQ does; return the rounded weights."""
    from safetensors.torch import save_file

    stored, rounded = {}, {}
    for name, value in tensors_of(TINY).items():
        module = llava_folder.module_name(name.removesuffix(".weight"))
        # transformers 4, whose names AutoAWQ writes, has one more level in the vision tower.
        classic = name.replace("vision_tower.", "vision_tower.vision_model.")
        if not llava_folder.is_linear(module, vision=False):
            stored[classic] = rounded[module] = value
            continue
        rows, columns = value.shape
        groups = value.float().view(rows, -1, group)
        scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()
        zeros = (-groups.amin(-1) / scales).round().clamp(0, 15)
        steps = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        rounded[module] = ((steps - zeros[..., None]) * scales[..., None]).view(rows, columns)
        stem = classic.removesuffix(".weight")
        stored[f"{stem}.qweight"] = pack(steps.view(rows, columns).T.contiguous())
        stored[f"{stem}.qzeros"] = pack(zeros.T.contiguous())
        stored[f"{stem}.scales"] = scales.T.half().contiguous()
    save_file(stored, out / "model.safetensors")
    llava_folder.copy_sidecars(TINY, out)
    llava_folder.write_config(
        TINY, out, dtype=torch.float16, quantization_config={"quant_method": "awq"}
    )
    return rounded


def probe_logits(model: Any, *, images: bool = True) -> torch.Tensor:
    """Return log probabilities [tokens, vocabulary] for fixed ids behind a fixed image."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.randint(5, 900, (1, 24), generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if images:
        run = torch.full((1, config.image_seq_length), config.image_token_id)
        ids = torch.cat([ids[:, :4], run, ids[:, 4:]], dim=1)
        size = config.vision_config.image_size
        pixels = torch.randn(1, 3, size, size, generator=generator)
        inputs["pixel_values"] = pixels.to(model.model.vision_tower.dtype)
    with torch.inference_mode():
        logits = model(input_ids=ids, **inputs).logits
    return logits[0].float().log_softmax(-1)


def engine_logits(engine: Engine) -> torch.Tensor:
    """Return log probabilities of a teacher-forced text behind an image."""
    rng = np.random.default_rng(0)
    picture = random_picture(engine, rng)
    encode = engine.tokenizer
    before = encode("USER: ")["input_ids"]
    after = encode("\nDescribe this image in detail. ASSISTANT:", add_special_tokens=False)
    image = [engine.family.vision.image_token_id] * picture.num_tokens
    prompt = Prompt((*before, *image, *after["input_ids"]), (picture,))
    answer = encode(" A red sign that says OPEN.", add_special_tokens=False)["input_ids"]
    return engine.score(prompt, answer).log_softmax(-1)


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean of KL(reference || other) over tokens, in nats."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor by name."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in folder.rglob("*.safetensors"):
        found |= load_file(path)
    return found


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor by its name as transformers 5's parameter."""
    return {llava_folder.module_name(name): value for name, value in tensors_of(folder).items()}
