"""Write the report: one HTML file, Markdown, the data as JSON and a model card per variant."""

import json
from dataclasses import asdict
from pathlib import Path

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.storage import Storage
from llava_ray.artifacts.store import CARD, PASSPORT
from llava_ray.report.findings import Findings


def write_report(folder: Path, findings: Findings) -> None:
    """Write report.html, report.md with its pictures, report.json, config.yaml and cards/.

    Each card and passport is written beside its variant's files too, as README.md and
    passport.json, which no manifest lists: what they say is newer than the variant.

    Raises ArtifactError when a record that a scorecard names is gone.
    """
    from llava_ray.report.content import make_content
    from llava_ray.report.findings import find_origins
    from llava_ray.report.pages import write_card, write_page
    from llava_ray.report.passport import passport

    origins = find_origins(findings)
    content = make_content(findings, origins)
    for plot in content["plots"]:
        (folder / plot.file_name).write_bytes(plot.png)
    tree = {
        "code_digest": code_digest("report"),
        "winner": findings.winner.slug,
        "reasons": findings.reasons,
        "rows": [row.model_dump(mode="json") for row in content["rows"]],
        "conditions": dict(content["conditions"]),
    }
    texts = {
        "report.html": write_page("report.html.j2", content),
        "report.md": write_page("report.md.j2", content) + "\n",
        "report.json": json.dumps(tree, indent=1),
        "config.yaml": content["config_yaml"],
    }
    for card in findings.scorecards:
        variant = origins.variants[card.slug]
        template = Storage(variant.uri).read_text("chat_template.jinja")
        text = write_card(card, variant, origins, template)
        stamps = json.dumps([asdict(entry) for entry in passport(card.slug)], indent=1)
        for name, beside in ((CARD, text), (PASSPORT, stamps + "\n")):
            texts[f"cards/{card.slug}/{name}"] = beside
            Storage(variant.uri).write_text(name, beside)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
