"""How much of the loss that low bits cost LoRA wins back: the article's idea, measured.

One process without Ray or DeepSpeed; the model, the loss and the data are those of the product.
"""

import itertools
import json
import logging
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava_ray.artifacts import local_folder
from llava_ray.config import RunConfig, TrainConfig
from llava_ray.conversation import IGNORE_INDEX, read_samples
from llava_ray.low_bits import round_base
from llava_ray.models import model_folder, vision_shape, weights_sha256
from llava_ray.records import DatasetRecord
from llava_ray.train import adapt
from llava_ray.train.batches import (
    Batch,
    CaptionSamples,
    RankBatches,
    StreamOrder,
    collate,
    eval_batches,
    pad_id,
    text_lengths,
)
from llava_ray.train.schedule import rate_factor

logger = logging.getLogger(__name__)


def run(config: RunConfig, dataset: DatasetRecord, out: Path, *, bits: tuple[int, ...]) -> None:
    """Train LoRA over the base and over its HQQ roundings; write the held-out losses as JSON."""
    rows: list[dict[str, Any]] = []
    for number in (16, *bits):
        changes: dict[str, Any] = {"method": "lora", "zero_stage": 0}
        if number < 16:
            changes |= {"method": "hqq", "hqq_bits": number}
        train = TrainConfig.model_validate(config.train.model_dump() | changes)
        began = time.monotonic()
        before, after = _losses(config, train, dataset)
        rows.append({"bits": number, "loss_before": before, "loss_after": after})
        rows[-1]["train_s"] = time.monotonic() - began
        whole = rows[0]["loss_before"]
        if number < 16:
            rows[-1]["recovered_share"] = (before - after) / (before - whole)
        logger.info("recovery: %s", rows[-1])
    tree = {
        "model": config.model.path,
        "base_model_sha256": weights_sha256(model_folder(config.model)),
        "dataset": dataset.id,
        "device": platform.machine(),
        "torch": torch.__version__,
        "group_size": config.train.hqq_group_size,
        "train": config.train.model_dump(mode="json"),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _losses(config: RunConfig, train: TrainConfig, dataset: DatasetRecord) -> tuple[float, float]:
    """Return the held-out loss in nats per supervised token before and after training."""
    folder, data = model_folder(config.model), local_folder(dataset)
    torch.manual_seed(train.seed)
    model = adapt.load_base(folder, dtype=torch.float32, device="cpu")
    if train.method == "hqq":
        round_base(model, bits=train.hqq_bits, group_size=train.hqq_group_size)
    loss = adapt.loss_module(adapt.adapt(model, train), train)
    samples, held_out = (_samples(config, data, name) for name in ("train.json", "test.json"))
    before = _held_out(loss, held_out, train)
    groups = adapt.parameter_groups(loss, train)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    total = train.max_steps or int(train.epochs * len(samples) // train.batch_size)
    loss.train()
    for step, batch in enumerate(itertools.islice(_batches(samples, train), total)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor("cosine", step, total_steps=total, warmup_steps=2)
        (loss(**batch) / _supervised(batch)).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return before, _held_out(loss, held_out, train)


def _samples(config: RunConfig, data: Path, name: str) -> CaptionSamples:
    from transformers import AutoTokenizer

    folder = model_folder(config.model)
    return CaptionSamples(
        samples=read_samples(data / name),
        images=data / "images",
        tokenizer=AutoTokenizer.from_pretrained(folder),
        shape=vision_shape(folder),
        max_length=config.train.max_length,
        max_image_pixels=config.data.max_image_pixels,
        system=config.model.system_prompt,
    )


def _batches(samples: CaptionSamples, train: TrainConfig) -> Iterator[Batch]:
    lengths, size = text_lengths(samples.samples), train.batch_size
    order = StreamOrder(lengths, seed=train.seed, group=size, by_length=True)
    for indices in RankBatches(order, 0, size, rank=0, world_size=1):
        yield collate([samples[i] for i in indices], pad_token_id=pad_id(samples.tokenizer))


def _held_out(loss: Any, samples: CaptionSamples, train: TrainConfig) -> float:
    total, tokens = 0.0, 0
    loss.eval()
    with torch.no_grad():
        for batch in eval_batches(samples, batch_size=train.batch_size, rank=0, world_size=1):
            total += float(loss(**batch))
            tokens += _supervised(batch)
    return total / tokens


def _supervised(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
