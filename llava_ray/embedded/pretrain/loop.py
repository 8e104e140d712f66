"""Pretraining of the embedded model from scratch, in runs that resume.

LLaVA's two stages, except that nothing is pretrained and so everything trains in both: first
transcription of single words growing into scenes, then questions of many kinds. A probe on the
vision tower learns beside it which letter stands in which patch (see network.Probe).
"""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_ray.embedded.pretrain.augment import IGNORE, patch_targets, random_affine, relight, warp
from llava_ray.embedded.pretrain.checkpoint import STATE, Progress, load_checkpoint, save_checkpoint
from llava_ray.embedded.pretrain.decode import read_held_out
from llava_ray.embedded.pretrain.examples import Encoder
from llava_ray.embedded.pretrain.feed import Feed, Pool
from llava_ray.embedded.pretrain.network import (
    LETTERS_PER_PATCH,
    Probe,
    Reader,
    Shape,
    attention_mask,
    tail_positions,
)
from llava_ray.embedded.scene_text import load_assets

log = logging.getLogger(__name__)

RESERVE_S = 25.0
"""Kept at a call's end for the last scores and the checkpoint."""
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class PretrainSettings:
    """What a call trains with."""

    out: Path
    """Checkpoint and log; a checkpoint found there is resumed."""
    assets: Path | None = None
    """Folder of packed fonts and words; default: the installed packages."""
    minutes: float = 9.5
    """Wall time of this call."""
    until: float = 1.0
    """Share of the planned run at which this call ends; the learning rate follows the share."""
    batch_size: int = 512
    learning_rate: float = 1.2e-3
    warmup_steps: int = 200
    probe_weight: float = 1.0
    pool_size: int = 32_768
    min_pool: int = 4_096
    """Examples to have before the first step."""
    workers: int = max(1, (os.cpu_count() or 2) - 1)
    compile: bool = False
    shape: Shape = Shape()
    """Smaller ones serve tests."""
    seed: int = 0
    score_every_s: float = 60.0
    score_samples: int = 256
    """Held-out pictures read at the end; a quarter of them in between; 0 reads none."""
    log_every_steps: int = 50
    max_steps: int | None = None
    """Ends a call earlier, for tests."""


def pretrain(settings: PretrainSettings) -> Progress:
    """Train until the call's time is over; return the progress that was saved."""
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    encoder = Encoder.of()
    assets = load_assets("train", settings.assets)
    feed = Feed(
        assets, encoder, workers=settings.workers, chunks_per_worker=8, seed=_feed_seed(settings)
    )
    try:
        return _Run(settings, encoder, feed, began).train()
    finally:
        feed.close()


def _feed_seed(settings: PretrainSettings) -> int:
    """Give every call its own pictures."""
    state = settings.out / STATE
    done = json.loads(state.read_text(encoding="utf-8"))["steps"] if state.is_file() else 0
    return settings.seed + 7919 * int(done)


class _Run:
    """One call of `pretrain`."""

    def __init__(
        self, settings: PretrainSettings, encoder: Encoder, feed: Feed, began: float
    ) -> None:
        self.settings, self.encoder, self.feed, self.began = settings, encoder, feed, began
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        self.reader = Reader(settings.shape).to(self.device)
        self.probe = Probe(settings.shape).to(self.device)
        self.modules: dict[str, nn.Module] = {"reader": self.reader, "probe": self.probe}
        self.optimizer = self._optimizer()
        self.before = Progress()
        if (settings.out / STATE).is_file():
            self.before = load_checkpoint(settings.out, self.modules, self.optimizer)
            log.info("resumed at %.1f%%, step %d", 100 * self.before.share, self.before.steps)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed + self.before.steps)
        self.pool = Pool(settings.pool_size, self.device)
        self.pool.pin(feed)
        self.prefix = torch.tensor(encoder.prefix(), device=self.device)
        self.steps = self.before.steps
        # Without the shards of second moments the rate has to warm up again.
        self.warm_from = 0 if self.optimizer.state else self.before.steps
        self.first_step_at = 0.0

    def _optimizer(self) -> torch.optim.Optimizer:
        named = [pair for module in self.modules.values() for pair in module.named_parameters()]
        matrices = [value for name, value in named if value.ndim > 1 and "embed" not in name]
        others = [value for name, value in named if value.ndim <= 1 or "embed" in name]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.settings.learning_rate,
            betas=BETAS,
            fused=self.device.type == "cuda",
        )

    def train(self) -> Progress:
        """Step until the time is over, then save."""
        settings = self.settings
        self.feed.set_progress(self.before.share)
        self.pool.wait_for(self.feed, settings.min_pool)
        step: Callable[..., tuple[Tensor, Tensor]] = self._losses
        if settings.compile:
            step = torch.compile(self._losses, dynamic=False)
        self._warm_up(step)
        self.first_step_at = last_score = time.monotonic()
        log.info("first step after %.0f s", self.first_step_at - self.began)
        while not self._over():
            self.pool.refill(self.feed)
            share = self.share()
            self.feed.set_progress(share)
            losses = self._step(step, share)
            if self.steps % settings.log_every_steps == 0:
                self._log(share, *losses)
            if time.monotonic() - last_score > settings.score_every_s:
                self._score(settings.score_samples // 4)
                last_score = time.monotonic()
        self._score(settings.score_samples)
        progress = self._progress()
        save_checkpoint(settings.out, self.modules, self.optimizer, progress)
        return progress

    def _warm_up(self, step: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Compile forward and backward before the clock of the schedule starts."""
        caption, letters = step(*self._batch())
        _backward(caption + letters)
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(
        self, step: Callable[..., tuple[Tensor, Tensor]], share: float
    ) -> tuple[Tensor, Tensor]:
        settings = self.settings
        rate = learning_rate_share(share, self.steps - self.warm_from, settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        caption, letters = step(*self._batch())
        _backward(caption + settings.probe_weight * (1 - 0.7 * share) * letters)
        parameters = [value for module in self.modules.values() for value in module.parameters()]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return caption.detach(), letters.detach()

    def _batch(self) -> tuple[Tensor, ...]:
        batch = self.pool.sample(self.settings.batch_size, self.generator)
        maps = random_affine(self.settings.batch_size, self.device, self.generator)
        pixels = relight(warp(batch["image"], maps), self.generator)
        shape = self.reader.shape
        targets = patch_targets(
            batch["glyphs"], maps, size=shape.image_size, patch=shape.patch_size
        )
        return pixels, batch["ids"].long(), batch["weights"], batch["segments"].long(), targets

    def _losses(
        self, pixels: Tensor, ids: Tensor, weights: Tensor, segments: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss on captions and the probe's."""
        before = len(self.prefix) + self.reader.shape.patches
        mask = attention_mask(segments, before)
        positions = tail_positions(segments, before)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.reader.see(pixels)
            logits = self.reader.read(features, self.prefix, ids, positions, mask)
            guesses = self.probe(features)
        return caption_loss(logits, ids, weights), probe_loss(guesses, targets)

    def share(self) -> float:
        """Return how far the planned run is, by the time of this call."""
        end = self.began + 60 * self.settings.minutes - RESERVE_S
        spent = time.monotonic() - self.first_step_at
        here = min(1.0, spent / max(1.0, end - self.first_step_at))
        if self.settings.max_steps is not None:
            here = min(1.0, (self.steps - self.before.steps) / max(1, self.settings.max_steps))
        return self.before.share + (self.settings.until - self.before.share) * here

    def _over(self) -> bool:
        done = self.steps - self.before.steps
        if self.settings.max_steps is not None:
            return done >= self.settings.max_steps
        return time.monotonic() > self.began + 60 * self.settings.minutes - RESERVE_S

    def _progress(self) -> Progress:
        done = self.steps - self.before.steps
        return Progress(
            share=self.share(),
            steps=self.steps,
            samples=self.before.samples + done * self.settings.batch_size,
            rendered=self.before.rendered + self.pool.received,
            seconds=self.before.seconds + time.monotonic() - self.began,
            seed=self.settings.seed,
        )

    def _log(self, share: float, caption: Tensor, letters: Tensor) -> None:
        spent = time.monotonic() - self.first_step_at
        done = self.steps - self.before.steps
        left = 60 * self.settings.minutes - RESERVE_S - (time.monotonic() - self.began)
        self._write(
            share=round(share, 4),
            loss=round(caption.item(), 4),
            probe_loss=round(letters.item(), 4),
            trained_per_s=round(done * self.settings.batch_size / spent, 1),
            rendered_per_s=round(self.pool.received / (time.monotonic() - self.began), 1),
            left_s=round(left),
        )

    def _score(self, count: int) -> None:
        if not count:
            return
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            scores = read_held_out(
                self.reader, self.encoder, count=count, assets=self.settings.assets
            )
        self._write(**dataclasses.asdict(scores))

    def _write(self, **row: Any) -> None:
        line = json.dumps({"step": self.steps, **row})
        log.info("%s", line)
        self.settings.out.mkdir(parents=True, exist_ok=True)
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def learning_rate_share(share: float, step: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate: warm up, hold to 40%, then a cosine to 2%."""
    decayed = max(0.0, share - 0.4) / 0.6
    factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
    return factor * min(1.0, (step + 1) / max(1, warmup_steps))


def _backward(loss: Tensor) -> None:
    torch.autograd.backward([loss])


def caption_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross entropy of each token given those before it."""
    wanted = weights[:, 1:].float()
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return (each * wanted.flatten()).sum() / wanted.sum().clamp(min=1)


def probe_loss(guesses: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the probe's mean losses; empty patches together weigh a fifth."""
    parts = torch.split(guesses.float(), list(Probe.OUTPUTS), dim=-1)
    filled = (targets[..., 0] > 0).float()
    empty = 1 - filled
    balance = filled / filled.sum().clamp(min=1) + 0.2 * empty / empty.sum().clamp(min=1)
    total = torch.zeros((), device=guesses.device)
    for index, part in enumerate(parts):
        each = F.cross_entropy(
            part.flatten(0, 1), targets[..., index].flatten(), ignore_index=IGNORE, reduction="none"
        )
        scale = 1.0 if index < LETTERS_PER_PATCH else 0.5
        total = total + scale * (each.view_as(balance) * balance).sum()
    return total
