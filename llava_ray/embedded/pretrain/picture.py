"""A picture of what the model reads: held-out scenes with its answers below them."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from llava_ray.embedded.pretrain.scores import describe, load_model
from llava_ray.embedded.scene_text import dataset_picture, load_assets

SEED = 7
"""Of the scenes; other ones than those that are scored."""
ROWS, COLUMNS = 2, 3
WIDTH = 44
"""Letters in a line of an answer."""


def draw_readings(folder: Path, out: Path, assets: Path | None = None) -> Path:
    """Write a PNG of scenes in a grid, each with the model's greedy answer."""
    loaded = load_assets("held_out", assets)
    images = [dataset_picture(loaded, SEED, index)[0] for index in range(ROWS * COLUMNS)]
    answers = describe(*load_model(folder), images)
    figure = Figure(figsize=(4 * COLUMNS, 4.3 * ROWS), layout="constrained")
    axes = figure.subplots(ROWS, COLUMNS).flat
    for axis, image, answer in zip(axes, images, answers, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(textwrap.fill(answer, WIDTH), fontsize=10, y=-0.02, va="top")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    return out
