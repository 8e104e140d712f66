"""The keys of `llava-ray pretrain ACTION key=value ...`."""

import os
from pathlib import Path

from pydantic import Field

from llava_ray.config.section import Count, Positive, Section
from llava_ray.models.folder import EMBEDDED


class PretrainSettings(Section):
    """What the actions read and write, and how `train` trains."""

    out: Path = Field(default=Path("runs/pretrain"))
    """Checkpoint and log of the training; a checkpoint found there is resumed."""
    assets: Path | None = Field(default=None)
    """Folder of packed fonts and words; default: the installed packages."""
    model: Path = Field(default=EMBEDDED)
    scores: Path = Field(default=Path("jobs/results/pretrain.json"))
    embedded: Path = Field(default=Path("jobs/results/embedded.json"))
    """Scores of held-out words and fonts, by jobs/bench/embedded.py."""
    picture: Path = Field(default=Path("jobs/results/reading.png"))
    images: Count = Field(default=256)
    """Scenes that `score` reads."""
    minutes: Positive = Field(default=9.5)
    """Wall time of one call, which ends earlier when max_steps are done."""
    max_steps: Count = Field(default=1900)
    """Of the whole run, over all calls; learning rate and difficulty follow the share done."""
    batch_size: Count = Field(default=512)
    uses: Count = Field(default=1)
    """Steps in a row that train on a picture, each time moved and lit anew. Raise it where
    renderers are slower than the GPU (data echoing, https://arxiv.org/abs/1907.05550)."""
    learning_rate: Positive = Field(default=1.2e-3)
    warmup_steps: int = Field(default=200, ge=0)
    probe_weight: float = Field(default=1.0, ge=0)
    workers: Count = Field(default=max(1, (os.cpu_count() or 2) - 1))
    """Renderer processes."""
    compile: bool = Field(default=False)
    seed: int = Field(default=0)
    score_every_s: Positive = Field(default=60.0)
    score_samples: int = Field(default=256, ge=0)
    """Held-out pictures read at the end; a quarter of them in between; 0 reads none."""
    log_every_steps: Count = Field(default=50)
