"""The report of a sweep: a table, parallel coordinates and learning curves."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.artifacts import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llava_ray.sweep.search import Search


def write_report(done: "Search", best: Trial, folder: Path, *, objective: str) -> None:
    """Write report.md, parallel_coordinates.png and learning_curves.png into a folder."""
    (folder / "report.md").write_text(_table(done, best, objective), encoding="utf-8")
    _draw(folder / "learning_curves.png", lambda axes: _curves(axes, done, best, objective))
    _draw(folder / "parallel_coordinates.png", lambda axes: _parallel(axes, done, objective))


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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(path: Path, fill: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
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


def _parallel(axes: "Axes", done: "Search", objective: str) -> None:
    """Draw a line per trial through one axis per setting, coloured by the objective."""
    from matplotlib import colormaps

    scored = [trial for trial in done.trials if trial.value is not None]
    keys = list(scored[0].settings)
    values = [trial.value for trial in scored if trial.value is not None]
    columns = [_heights([trial.settings[key] for trial in scored]) for key in keys]
    columns.append(_heights(values))
    best_first = _heights(values)
    for index in sorted(range(len(scored)), key=lambda i: -best_first[i]):
        colour = colormaps["viridis_r"](best_first[index])
        axes.plot([column[index] for column in columns], color=colour, linewidth=1.5)
    axes.set_xticks(range(len(keys) + 1), [*keys, objective])
    axes.set_yticks([])
    for x, column in enumerate([*([t.settings[k] for t in scored] for k in keys), values]):
        axes.axvline(x, color="0.7", linewidth=0.8)
        for value, height in {
            (_short(v), h) for v, h in zip(column, _heights(column), strict=True)
        }:
            axes.annotate(value, (x, height), xytext=(3, 0), textcoords="offset points", fontsize=7)


def _heights(values: list[Any]) -> list[float]:
    """Place values between 0 and 1: by their logarithm where all are positive numbers."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        names = sorted({str(v) for v in values})
        return [names.index(str(v)) / max(1, len(names) - 1) for v in values]
    scaled = [math.log(v) for v in values] if min(values) > 0 else [float(v) for v in values]
    low, high = min(scaled), max(scaled)
    return [(v - low) / (high - low) if high > low else 0.5 for v in scaled]
