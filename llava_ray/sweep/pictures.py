"""The report of a sweep: a table and learning curves; TensorBoard draws the rest."""

from pathlib import Path
from typing import Any

from jinja2 import Template
from matplotlib.figure import Figure

from llava_ray.artifacts.records import Trial
from llava_ray.sweep.search import Search


def write_report(done: Search, best: Trial, folder: Path, *, objective: str) -> None:
    """Write report.md and learning_curves.png into a folder."""
    template = Path(__file__).with_name("report.md.j2").read_text(encoding="utf-8")
    page = Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        trials=sorted(done.trials, key=lambda t: (t.value is None, t.value or 0)),
        best=best, objective=objective, steps_per_trial=done.steps_per_trial, short=_short,
    )  # fmt: skip
    (folder / "report.md").write_text(page, encoding="utf-8")
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
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
    figure.savefig(folder / "learning_curves.png", dpi=120)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(str(part).removesuffix("_proj") for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
