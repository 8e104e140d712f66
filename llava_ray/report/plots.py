"""Size against speed, and size against fidelity, as SVG that follows the page's colours."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_ray.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, LINE, CARD = "#1c2430", "#d5dae1", "#fefefe"
METHOD_COLOURS = {
    "none": "#5b6675",
    "bnb": "#b4540a",
    "hqq": "#1d6fd1",
    "gguf": "#11805f",
    "awq": "#a3278f",
}
MARKERS = {"none": "D", "bnb": "s", "hqq": "o", "gguf": "^", "awq": "P"}
PALETTE = {"ink": INK, "line": LINE, "card": CARD, **METHOD_COLOURS}

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


@dataclass(frozen=True)
class _Axis:
    title: str
    label: str
    value: Callable[[Row], tuple[float, float, float] | None]
    """Middle, low and high."""
    log: bool = False


def make_plots(rows: Sequence[Row]) -> list[Plot]:
    """Draw speed and divergence over size; rows without measurements are left out."""
    speed = _Axis("Speed over size", "decoded tokens per second", _speed)
    fidelity = _Axis(
        "Fidelity over size", "KL divergence from the baseline, nats", _divergence,
        log=True,
    )  # fmt: skip
    measured = [row for row in rows if row.size_bytes is not None]
    return [_plot(measured, axis) for axis in (speed, fidelity)]


def _speed(row: Row) -> tuple[float, float, float] | None:
    spread = row.decode_tokens_per_s
    return (spread.median, spread.low, spread.high) if spread else None


def _divergence(row: Row) -> tuple[float, float, float] | None:
    spread = row.kl_divergence
    # The baseline differs from itself by rounding alone, which a log scale has no place for.
    if spread is None or row.status == "baseline" or not spread.median > 0:
        return None
    return spread.median, max(spread.low, spread.median * 1e-3), spread.high


def _plot(rows: Sequence[Row], axis: _Axis) -> Plot:
    import matplotlib

    matplotlib.use("Agg")
    style: dict[Any, Any] = {
        "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": axis.title.split()[0].lower(),
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": LINE, "grid.color": LINE,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = _draw(rows, axis)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Plot(axis.title, _themed(svg.getvalue(), axis), png.getvalue())


def _draw(rows: Sequence[Row], axis: _Axis) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    unit, name = (1e9, "GB") if any((r.size_bytes or 0) >= 1e9 for r in rows) else (1e6, "MB")
    points = [
        (row, (row.size_bytes or 0) / unit, value) for row in rows if (value := axis.value(row))
    ]
    for row, size, (middle, low, high) in points:
        method = row.slug.partition("-")[0]
        colour = METHOD_COLOURS.get(method, INK)
        axes.errorbar(
            [size], [middle], yerr=[[middle - low], [high - middle]], color=colour, linewidth=1,
            marker=MARKERS.get(method, "o"), markersize=8, markeredgewidth=1.5,
            markerfacecolor=colour if row.on_front else CARD,
        )  # fmt: skip
        if row.status == "winner":
            axes.plot([size], [middle], "o", markersize=17, color="none", markeredgecolor=colour)
    axes.set_xlabel(f"size on disk, {name}")
    axes.set_ylabel(axis.label)
    axes.margins(0.14)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axis.log and points:
        axes.set_yscale("log")
    elif points:
        axes.set_ylim(bottom=0)
    _label(figure, axes, points)
    return figure


def _label(figure: "Figure", axes: Any, points: Sequence[tuple[Row, float, Any]]) -> None:
    """Write each slug where it covers neither another label nor a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    # Matplotlib's canvas carries no annotations.
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    inside = axes.bbox.expanded(1.04, 1.02)
    centres = [axes.transData.transform((size, value[0])) for _, size, value in points]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centres]
    for row, size, value in points:
        winner = row.status == "winner"
        text = axes.annotate(
            row.slug, (size, value[0]), (0, 0), textcoords="offset points", fontsize=9.5,
            weight="bold" if winner else "normal",
        )  # fmt: skip
        # Beyond the winner's ring.
        away = 1.6 if winner else 1.0
        clashes = []
        for dx, dy in _PLACES:
            box = _moved(text, away * dx, away * dy).get_window_extent(renderer)
            outside = not (inside.containsx(box.x0) and inside.containsx(box.x1))
            clashes.append(sum(box.overlaps(other) for other in taken) + 2 * outside)
        dx, dy = _PLACES[clashes.index(min(clashes))]
        taken.append(_moved(text, away * dx, away * dy).get_window_extent(renderer))


def _moved(text: Any, dx: float, dy: float) -> Any:
    """Put an annotation so many points from its point, on that side of it."""
    text.set(position=(dx, dy), ha="left" if dx > 0 else "right" if dx < 0 else "center")
    return text


def _themed(svg: str, axis: _Axis) -> str:
    """Drop the XML prologue, name the picture for screen readers and use the page's colours."""
    body = svg[svg.index("<svg") :]
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name})")
    return body.replace("<svg ", f'<svg role="img" aria-label="{axis.title}" ', 1)
