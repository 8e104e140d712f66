"""The model card of one variant: what it is, how to load it, what was measured."""

import re

import yaml

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.report.columns import number, size_text
from llava_ray.report.findings import Origins
from llava_ray.report.markdown import escape

LIBRARIES = {"none": "transformers", "bnb": "transformers", "awq": "transformers", "gguf": "gguf"}

LOADING = {
    "none": """```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)
```""",
    "bnb": """```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(folder)  # needs bitsandbytes
processor = AutoProcessor.from_pretrained(folder)
```""",
    "awq": "The folder has AutoAWQ's layout, which vLLM and transformers (with gptqmodel) read.",
    "gguf": """```bash
llama-mtmd-cli -m TEXT --mmproj MMPROJ --image photo.jpg -p "Describe this image in detail."
```""",
}


def write_card(card: Scorecard, variant: Variant, origins: Origins) -> str:
    """Return README.md for the variant's folder, with the front matter that model hubs read."""
    base = origins.merged.base_model if origins.merged else ""
    front = {
        "pipeline_tag": "image-text-to-text",
        **({"library_name": LIBRARIES[variant.method]} if variant.method in LIBRARIES else {}),
        **({"base_model": base} if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else {}),
        "tags": ["llava", "quantized", variant.method],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {variant.slug}",
        _what(variant, origins),
        "## Load",
        _loading(variant),
        "## Measured",
        _measures(card),
        f"On {escape(card.device)}, batch 1; fidelity against the unquantized model over "
        f"{card.kl_divergence.repeats} held-out captions with the same tokens and pixels.",
        "## Limits",
        "Images are padded to a square with CLIP's mean colour before they are resized; other "
        "preprocessing gives other answers. The figures hold for captions like those of the data "
        "set. The licence is that of the base model and of the training captions.",
        "## Files",
        "\n".join(
            f"- `{name}` {size_text(entry.size_bytes)}, SHA-256 `{entry.sha256}`"
            for name, entry in variant.files.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _what(variant: Variant, origins: Origins) -> str:
    base = f" from {escape(origins.merged.base_model)}" if origins.merged else ""
    return (
        f"LLaVA{base}, fine-tuned on {escape(origins.dataset.source)} (`{origins.dataset.id}`); "
        f"method `{variant.method}`, {number(variant.bits_per_weight)} bits per quantized weight, "
        f"{size_text(variant.size_bytes)} in all{_estimate(variant)}. "
        "The vision tower and the projector keep the precision that the files state. "
        f"Made by llava_ray {variant.code_version} as `{variant.id}`."
    )


def _estimate(variant: Variant) -> str:
    if variant.estimated_bytes is None:
        return ""
    return f" ({size_text(variant.estimated_bytes)} were expected)"


def _loading(variant: Variant) -> str:
    own = (
        "```python\nfrom pathlib import Path\nfrom llava_ray.quantize.registry import spec_for\n\n"
        f'engine = spec_for("{variant.slug}").open_engine(\n'
        '    Path(folder), device="cpu", slots=1, context=1024\n)\n```'
    )
    text = LOADING.get(variant.method)
    if text is None:
        return own
    pair = sorted(name for name in variant.files if name.endswith(".gguf"))
    for name in pair:
        text = text.replace("MMPROJ" if "mmproj" in name else "TEXT", name)
    return f"{text}\n\nOr with llava_ray:\n\n{own}"


def _measures(card: Scorecard) -> str:
    kl = card.kl_divergence
    rows = {
        "decoded tokens/s": number(card.decode_tokens_per_s.median),
        "prefill, s": number(card.prefill_s.median),
        "peak memory": size_text(card.memory_bytes),
        "KL divergence, nats (95% interval)": f"{number(kl.median)} "
        f"({number(kl.low)} to {number(kl.high)})",
        "top-1 agreement": f"{card.top1_agreement:.1%}",
        "perplexity of the captions": number(card.perplexity),
        **{name: number(value) for name, value in card.scores.items()},
    }
    lines = ["| measure | value |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
