"""The report as Markdown; its pictures lie beside it."""

import re

from llava_ray.report.columns import difference, make_columns
from llava_ray.report.content import Content


def write_markdown(content: Content, plot_names: list[str]) -> str:
    """Lay the parts out; what comes from captions and models cannot break the table."""
    parts = [
        f"**{escape(content.missing)}**" if content.missing else "",
        f"# {escape(content.title)}",
        f"Chosen: **{content.winner}**",
        _bullets(content.reasons),
        _facts(content),
        "## All variants",
        _table(content),
        f"\\* The article's figures are from {content.article}, so only their order compares.",
        *(escape(note) for note in content.notes),
        *(f"![{plot.title}]({name})" for plot, name in zip(content.plots, plot_names, strict=True)),
        "## The same images",
        *_pictures(content),
        "## How the winner was chosen",
        _bullets(content.limits),
        _reasons(content),
        "## Conditions",
        _conditions(content),
        "## Reproduce",
        "`config.yaml` lies beside this report. A finished measurement is found, not repeated: "
        "add `storage.uri=` with an empty folder to measure anew.",
        "```bash\n" + "\n".join(row.command for row in content.rows) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Make text safe inside a table cell and keep it from being markup."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", line)


def _table(content: Content) -> str:
    columns = make_columns(content.rows)
    article = " (article\\*)"
    titles = [
        "variant",
        *(c.title + (article if c.group == "Article*" else "") for c in columns),
        "why not",
    ]
    lines = [_line(titles), _line(["---", *("---:" for _ in columns), "---"])]
    for row in content.rows:
        name = f"**{row.slug}**" if row.status == "winner" else row.slug
        reason = "chosen" if row.status == "winner" else escape(row.reason)
        lines.append(_line([name, *(column.cell(row) for column in columns), reason]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bullets(texts: tuple[str, ...]) -> str:
    return "\n".join(f"- {escape(text)}" for text in texts)


def _facts(content: Content) -> str:
    return "\n".join(
        f"- {fact.label}: **{fact.value}**" + (f" ({fact.note})" if fact.note else "")
        for fact in content.facts
    )


def _pictures(content: Content) -> list[str]:
    parts = []
    for shown in content.shown:
        lines = [f"**{escape(shown.image)}**, reference: {escape(shown.reference)}", ""]
        lines += ["| variant | answer |", "| --- | --- |"]
        lines += [_line([answer.slug, escape(answer.text)]) for answer in shown.answers]
        parts.append("\n".join(lines))
    return parts


def _reasons(content: Content) -> str:
    lines = ["| variant | why not | KL minus the winner's (95%) |", "| --- | --- | ---: |"]
    lines += [
        _line([row.slug, escape(row.reason), difference(row)])
        for row in content.rows
        if row.status != "winner"
    ]
    return "\n".join(lines)


def _conditions(content: Content) -> str:
    lines = ["| | |", "| --- | --- |"]
    lines += [_line([escape(name), escape(value)]) for name, value in content.conditions]
    return "\n".join(lines)
