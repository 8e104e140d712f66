"""Size against speed, and size against fidelity, as SVG that follows the page's colours."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from llava_ray.artifacts.records import Spread
from llava_ray.report.columns import unit_of
from llava_ray.report.rows import Row

Points = Sequence[tuple[Row, float, Spread]]
"""Rows with their size, in the axis' unit, and what is drawn over it."""

INK, LINE, CARD = "#1c2430", "#d5dae1", "#fefefe"
METHOD_COLOURS = {
    "none": "#5b6675",
    "bnb": "#b4540a",
    "hqq": "#1d6fd1",
    "gguf": "#11805f",
    "awq": "#a3278f",
}
MARKERS = {"none": "D", "bnb": "s", "hqq": "o", "gguf": "^", "awq": "P"}

# Where a label may stand around its point, in points: the first that is free is taken.
_PLACES = [
    (dx, dy)
    for reach in (8, 18, 30)
    for dx, dy in ((reach, -3), (-reach, -3), (0, reach), (0, -reach - 6),
                   (reach, reach), (reach, -reach), (-reach, reach), (-reach, -reach))
]  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One picture in two forms."""

    title: str
    svg: str
    """Colours are CSS variables: --ink, --line, --card and one per method; text is text."""
    png: bytes

    @property
    def file_name(self) -> str:
        """Of the PNG."""
        return f"{self.title.lower().replace(' ', '_')}.png"


def make_plots(rows: Sequence[Row]) -> list[Plot]:
    """Draw speed and divergence over size; rows without measurements are left out."""
    unit, name = unit_of([row.size_bytes for row in rows])
    sized = [(row, row.size_bytes / unit) for row in rows if row.size_bytes is not None]
    speeds = [(row, size, rate) for row, size in sized if (rate := row.decode_tokens_per_s)]
    divergences = [
        (row, size, kl.model_copy(update={"low": max(kl.low, kl.median * 1e-3)}))
        for row, size in sized
        # The baseline differs from itself by rounding alone, which a log scale has no place for.
        if (kl := row.kl_divergence) and row.status != "baseline" and kl.median > 0
    ]
    return [
        _plot("Speed over size", name, "decoded tokens per second", speeds),
        _plot(
            "Fidelity over size", name, "KL divergence from the baseline, nats", divergences, True
        ),
    ]


def _plot(title: str, unit: str, label: str, points: Points, log: bool = False) -> Plot:
    style: dict[Any, Any] = {
        "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": title.split()[0].lower(),
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": LINE, "grid.color": LINE,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = _draw(points, unit, label, log)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    # Without the XML prologue, named for screen readers and in the page's colours.
    body = svg.getvalue().partition("<svg ")[2]
    for name, colour in {"ink": INK, "line": LINE, "card": CARD, **METHOD_COLOURS}.items():
        body = body.replace(colour, f"var(--{name})")
    return Plot(title, f'<svg role="img" aria-label="{title}" {body}', png.getvalue())


def _draw(points: Points, unit: str, label: str, log: bool) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for row, size, spread in points:
        method, middle = row.slug.partition("-")[0], spread.median
        colour = METHOD_COLOURS.get(method, INK)
        axes.errorbar(
            [size], [middle], yerr=[[middle - spread.low], [spread.high - middle]],
            color=colour, linewidth=1,
            marker=MARKERS.get(method, "o"), markersize=8, markeredgewidth=1.5,
            markerfacecolor=colour if row.on_front else CARD,
        )  # fmt: skip
        if row.status == "winner":
            axes.plot([size], [middle], "o", markersize=17, color="none", markeredgecolor=colour)
    axes.set_xlabel(f"size on disk, {unit}")
    axes.set_ylabel(label)
    axes.margins(0.14)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if log and points:
        axes.set_yscale("log")
    elif points:
        axes.set_ylim(bottom=0)
    _label(figure, axes, points)
    return figure


def _label(figure: Figure, axes: Any, points: Points) -> None:
    """Write each slug where it covers neither another label nor a point."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    inside = axes.bbox.expanded(1.04, 1.02)
    centres = [axes.transData.transform((size, spread.median)) for _, size, spread in points]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centres]
    for row, size, spread in points:
        winner = row.status == "winner"
        text = axes.annotate(
            row.slug, (size, spread.median), (0, 0), textcoords="offset points", fontsize=9.5,
            weight="bold" if winner else "normal",
        )  # fmt: skip
        # Beyond the winner's ring.
        away = 1.6 if winner else 1.0
        clashes = []
        for place in _PLACES:
            box = _moved(text, away, *place)
            outside = not (inside.containsx(box.x0) and inside.containsx(box.x1))
            clashes.append(sum(box.overlaps(other) for other in taken) + 2 * outside)
        taken.append(_moved(text, away, *_PLACES[clashes.index(min(clashes))]))


def _moved(text: Any, away: float, dx: float, dy: float) -> Bbox:
    """Put an annotation so many points from its point, on that side of it; return its box."""
    side = "left" if dx > 0 else "right" if dx < 0 else "center"
    text.set(position=(away * dx, away * dy), ha=side)
    box: Bbox = text.get_window_extent()
    return box
