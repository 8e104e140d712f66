"""The report as one HTML file that needs no network."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.report import columns as texts
from llava_ray.report.content import Content

if TYPE_CHECKING:
    from jinja2 import Environment


def write_html(content: Content) -> str:
    """Render the page; whatever comes from captions, models and configs is escaped."""
    table = texts.make_columns(content.rows)
    groups: dict[str, int] = {}
    for column in table:
        groups[column.group] = groups.get(column.group, 0) + 1
    starts = {
        next(i for i, column in enumerate(table) if column.group == group) for group in groups
    }
    context: dict[str, Any] = {
        "content": content,
        "columns": table,
        "groups": groups,
        "starts": starts,
        "bar_share": lambda column, row: texts.bar_share(column, row, content.rows),
        "difference": texts.difference,
        "measured": [row for row in content.rows if row.size_bytes is not None],
        "missing": [row for row in content.rows if row.size_bytes is None],
    }
    return _environment().get_template("report.html.j2").render(context)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
