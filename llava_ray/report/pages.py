"""The report as one HTML file and as Markdown, and a model card per variant, from templates."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llava_ray.artifacts.records import Scorecard, Variant
from llava_ray.report.columns import number, ranged, size_text
from llava_ray.report.findings import Origins
from llava_ray.report.passport import passport

LIBRARIES = {"none": "transformers", "bnb": "transformers", "awq": "transformers", "gguf": "gguf"}


def write_page(template: str, content: dict[str, Any]) -> str:
    """Render report.html.j2 or report.md.j2; what comes from captions, models and configs is
    escaped, and cannot break Markdown's tables."""
    return _templates().get_template(template).render(content)


def write_card(
    card: Scorecard, variant: Variant, origins: Origins, chat_template: str | None = None
) -> str:
    """Return README.md for the variant's folder, with the front matter that model hubs read.

    chat_template: the folder's, of which the format for Ollama hangs.
    """
    base = origins.merged.base_model if origins.merged else ""
    template = _templates().get_template("card.md.j2")
    return template.render(
        card=card,
        variant=variant,
        dataset=origins.dataset,
        base=base,
        base_on_hub=re.fullmatch(r"[\w.-]+/[\w.-]+", base),
        passport=passport(variant.slug),
        is_vicuna="USER: " in (chat_template or "") and "ASSISTANT:" in (chat_template or ""),
        pixels=origins.merged.pixel_differences if origins.merged else {},
        library=LIBRARIES.get(variant.method),
        pair=sorted(name for name in variant.files if name.endswith(".gguf")),
    )


def escape(text: str) -> str:
    """Make text safe inside a table cell of Markdown and keep it from being markup."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", line)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: str(name).endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": escape, "number": number, "size": size_text, "ranged": ranged,
    }  # fmt: skip
    return environment
