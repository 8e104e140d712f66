"""The picture of a run: loss and learning rate over steps."""

from collections.abc import Sequence
from pathlib import Path


def draw_curve(lines: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the training loss, its running mean and the held-out loss as a PNG."""
    from matplotlib.figure import Figure

    train = [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _, _ in train]
    axes.plot(steps, [loss for _, loss, _ in train], color="C0", alpha=0.3, label="train")
    axes.plot(steps, _running_mean([loss for _, loss, _ in train]), color="C0", label="train, mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per supervised token")
    rates = axes.twinx()
    rates.plot(steps, [rate for _, _, rate in train], color="C2", linewidth=0.8)
    rates.set_ylabel("learning rate", color="C2")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def _running_mean(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // 20)
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))
    ]
