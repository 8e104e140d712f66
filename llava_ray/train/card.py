"""What an adapter's folder says of itself: of what base, data and settings it is, how to use it."""

import re
from typing import Any

from llava_ray.artifacts.records import AdapterCheckpoint, DatasetRecord
from llava_ray.config.run import RunConfig


def adapter_card(config: RunConfig, dataset: DatasetRecord, metrics: dict[str, Any]) -> str:
    """Return the card, in place of the empty one that peft writes.

    metrics: those of the training's last report.
    """
    base, train = config.model.path, config.train
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    settings = train.model_dump(mode="json", exclude_defaults=True)
    scores = {name: metrics.get(name) for name in ("train_loss", "eval_loss")}
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        *([f"base_model: {base}"] if on_hub else []),
        "tags: [llava, lora]",
        "---",
        "",
        f"# {train.method} on {_plain(base)}",
        "",
        f"Trained by llava_ray on {dataset.num_train} rows of {_plain(dataset.source)} "
        f"(`{dataset.id}`), {metrics['step']} steps, seed {train.seed}, rank {train.lora_r}, alpha "
        f"{train.lora_alpha:g}, learning rate {train.learning_rate:g}. Loss in nats a token: "
        + ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)
        + ".",
        "",
        "What differs from the defaults of `train`:",
        "",
        *[f"- `{key}`: `{_plain(str(value))}`" for key, value in settings.items()],
        "",
        "The projector was trained too; its weights lie beside this folder, in "
        f"`{AdapterCheckpoint.projector_file}`."
        if train.projector_learning_rate > 0
        else "The projector was not trained.",
        "",
        "## Merge",
        "",
        *_merging(config),
        "",
    ]
    return "\n".join(lines)


def _merging(config: RunConfig) -> list[str]:
    base, train = config.model.path, config.train
    if train.method in ("hqq", "qlora"):
        return [
            "It was trained over a base of low bits. `llava-ray merge` with the training's "
            "config rounds the base likewise before it merges."
        ]
    first = (
        "from llava_ray.models.folder import EMBEDDED as base"
        if base == "embedded"
        else f"base = {base!r}"
    )
    projector = f'load_file("../{AdapterCheckpoint.projector_file}")'
    return [
        "`llava-ray merge` with the training's config, or here:",
        "",
        "```python",
        "from peft import PeftModel",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForImageTextToText",
        "",
        first,
        'model = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")',
        *(
            [f"model.load_state_dict({projector}, strict=False)"]
            if train.projector_learning_rate > 0
            else []
        ),
        'model = PeftModel.from_pretrained(model, ".").merge_and_unload()',
        "```",
    ]


def _plain(text: str) -> str:
    """Return a text on one line that is no markup."""
    return " ".join(text.split()).replace("`", "'").replace("<", "&lt;")
