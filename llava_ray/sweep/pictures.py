"""The report of a sweep: a table, parallel coordinates and learning curves."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.artifacts.records import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llava_ray.sweep.search import Search


_LABEL_HEIGHT = 0.045
"""Of a line of text, as a share of an axis."""


def write_report(done: "Search", best: Trial, folder: Path, *, objective: str) -> None:
    """Write report.md, parallel_coordinates.png and learning_curves.png into a folder."""
    (folder / "report.md").write_text(_table(done, best, objective), encoding="utf-8")
    _draw(folder / "learning_curves.png", lambda axes: _curves(axes, done, best, objective))
    _draw(folder / "parallel_coordinates.png", lambda axes: _parallel(axes, done, best, objective))


def _table(done: "Search", best: Trial, objective: str) -> str:
    keys = list(best.settings)
    used = sum(trial.steps for trial in done.trials)
    whole = done.steps_per_trial * len(done.trials)
    lines = [
        f"# Sweep of {len(done.trials)} trials, judged by {objective}",
        "",
        f"Best: trial {best.number} with {best.value:.5g}. {used} of {whole} steps were taken "
        f"({used / max(1, whole):.0%}); the rest was saved by stopping trials early.",
        "",
        "| trial | status | " + " | ".join(keys) + f" | steps | {objective} | error |",
        "|" + "---|" * (len(keys) + 5),
    ]
    for trial in sorted(done.trials, key=lambda t: (t.value is None, t.value or 0)):
        value = "" if trial.value is None else f"{trial.value:.5g}"
        cells = [_short(trial.settings[key]) for key in keys]
        error = (trial.error or "").replace("|", "/")[:200]
        row = [str(trial.number), trial.status, *cells, str(trial.steps), value, error]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(
        [*lines, "", "![](learning_curves.png)", "", "![](parallel_coordinates.png)", ""]
    )


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(str(part).removesuffix("_proj") for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw(path: Path, fill: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.add_subplot())
    figure.savefig(path, dpi=120)


def _curves(axes: "Axes", done: "Search", best: Trial, objective: str) -> None:
    for trial, curve in zip(done.trials, done.curves, strict=True):
        if not curve:
            continue
        is_best = trial.number == best.number
        steps, values = zip(*curve, strict=True)
        axes.plot(
            steps, values, ".-", color="C1" if is_best else "C0", alpha=1 if is_best else 0.4,
            label=f"trial {trial.number}, the best" if is_best else None,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(objective)
    axes.legend(loc="upper right")


def _parallel(axes: "Axes", done: "Search", best: Trial, objective: str) -> None:
    """Draw a line per trial through one axis per setting; the lighter, the better."""
    from matplotlib import colormaps

    scored = [trial for trial in done.trials if trial.value is not None]
    keys = list(best.settings)
    columns = [[trial.settings[key] for trial in scored] for key in keys]
    columns.append([trial.value for trial in scored])
    heights = [_heights(column) for column in columns]
    # The best are drawn last, over the others.
    for index in sorted(range(len(scored)), key=lambda i: -heights[-1][i]):
        is_best = scored[index].number == best.number
        axes.plot(
            [height[index] for height in heights],
            color="C1" if is_best else colormaps["viridis_r"](0.15 + 0.85 * heights[-1][index]),
            linewidth=3 if is_best else 1.3,
            label=f"trial {best.number}, the best" if is_best else None,
        )
    axes.set_xticks(range(len(columns)), [*keys, objective.replace(" after ", "\nafter ")])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.4)
    axes.spines[:].set_visible(False)
    for x, (column, height) in enumerate(zip(columns, heights, strict=True)):
        axes.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        _label_axis(axes, x, dict(zip(map(_short, column), height, strict=True)))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _label_axis(axes: "Axes", x: int, heights: dict[str, float]) -> None:
    """Write the values beside an axis, leaving out those that others would cover."""
    taken: list[float] = []
    for value, height in sorted(heights.items(), key=lambda item: item[1]):
        if taken and height - taken[-1] < _LABEL_HEIGHT:
            continue
        taken.append(height)
        axes.annotate(
            value, (x, height), xytext=(4, 0), textcoords="offset points", fontsize=8,
            va="center", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip


def _heights(values: list[Any]) -> list[float]:
    """Place values between 0 and 1: by their logarithm where all are positive numbers."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        names = sorted({str(v) for v in values})
        return [names.index(str(v)) / max(1, len(names) - 1) for v in values]
    scaled = [math.log(v) for v in values] if min(values) > 0 else [float(v) for v in values]
    low, high = min(scaled), max(scaled)
    return [(v - low) / (high - low) if high > low else 0.5 for v in scaled]
