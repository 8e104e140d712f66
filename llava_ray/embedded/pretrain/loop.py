"""Pretraining of the embedded model from scratch, in runs that resume.

LLaVA's two stages, except that nothing is pretrained and so everything trains in both: first
transcription of single words growing into scenes, then questions of many kinds. A probe on the
vision tower learns beside it which letter stands in which patch (see network.Reader).
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlavaConfig, get_wsd_schedule

from llava_ray.embedded.pretrain.augment import patch_targets, random_affine, relight, warp
from llava_ray.embedded.pretrain.examples import Encoder, Examples
from llava_ray.embedded.pretrain.export import CHECKPOINT, load_checkpoint, save_checkpoint
from llava_ray.embedded.pretrain.network import Reader, caption_loss, probe_loss
from llava_ray.embedded.pretrain.scores import read_scenes
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.embedded.scene_text import load_assets
from llava_ray.models.folder import EMBEDDED

log = logging.getLogger(__name__)

RESERVE_S = 25.0
"""Kept at a call's end for the checkpoint and the last scores."""
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
DECAY_SHARE = 0.6
"""The last part of the run, in which the learning rate falls along a cosine to LEAST_RATE."""
LEAST_RATE = 0.02
"""Share of the full learning rate."""
CHUNK = 32
"""Examples that a renderer sends at a time; they lie in /dev/shm until they are copied."""


def pretrain(settings: PretrainSettings, config: LlavaConfig | None = None) -> Path:
    """Train until the whole run or this call's minutes are over; return the checkpoint.

    config: of a smaller model, for tests; default: the shipped one.
    """
    return _Run(settings, config or LlavaConfig.from_pretrained(EMBEDDED)).train()


class _Run:
    """One call of `pretrain`."""

    def __init__(self, settings: PretrainSettings, config: LlavaConfig) -> None:
        self.settings, self.started = settings, time.monotonic()
        self.deadline = self.started + 60 * settings.minutes - RESERVE_S
        settings.out.mkdir(parents=True, exist_ok=True)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(settings.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)
        encoder = Encoder()
        self.reader = Reader(config, encoder.prefix()).to(self.device)
        if settings.compile:
            self.reader.compile(dynamic=False)
        # Matrices alone decay.
        groups: dict[float, list[nn.Parameter]] = {WEIGHT_DECAY: [], 0.0: []}
        for name, value in self.reader.named_parameters():
            groups[WEIGHT_DECAY if value.ndim > 1 and "embed" not in name else 0.0].append(value)
        self.optimizer = torch.optim.AdamW(
            [{"params": values, "weight_decay": decay} for decay, values in groups.items()],
            lr=settings.learning_rate, betas=BETAS,
        )  # fmt: skip
        self.schedule = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_decay_steps=round(DECAY_SHARE * settings.max_steps),
            num_training_steps=settings.max_steps,
            min_lr_ratio=LEAST_RATE,
        )
        self.parts = {
            "reader": self.reader, "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip
        self.first = self.step = 0
        if (settings.out / CHECKPOINT).is_file():
            self.first = self.step = load_checkpoint(settings.out, self.parts)
            log.info("resumed at step %d of %d", self.step, settings.max_steps)
        self.examples = Examples(load_assets("train", settings.assets), encoder)
        # Every call has pictures of its own.
        self.generator = torch.Generator(self.device).manual_seed(settings.seed + self.step)

    def train(self) -> Path:
        """Step until the run or the time is over, save, and score what was learned."""
        settings = self.settings
        scored = time.monotonic()
        batches = self._batches()
        while self.step < settings.max_steps and time.monotonic() < self.deadline:
            caption, letters = self._losses(next(batches))
            probe_weight = settings.probe_weight * (1 - 0.7 * self.share)
            torch.autograd.backward([caption + probe_weight * letters])
            nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
            if self.step % settings.log_every_steps == 0:
                self._log(caption.item(), letters.item())
            if time.monotonic() - scored > settings.score_every_s:
                self._score(settings.score_samples // 4)
                scored = time.monotonic()
        checkpoint = save_checkpoint(settings.out, self.step, self.parts)
        self._score(settings.score_samples)
        return checkpoint

    @property
    def share(self) -> float:
        """How far the whole run is, 0..1."""
        return self.step / self.settings.max_steps

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Gather the renderers' chunks, and give each batch as often as it is used."""
        settings = self.settings
        chunk = math.gcd(CHUNK, settings.batch_size)
        chunks: Iterator[dict[str, Tensor]] = iter(
            DataLoader(
                self.examples,
                batch_size=chunk,
                num_workers=settings.workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator().manual_seed(settings.seed + self.step),
            )
        )
        while True:
            self.examples.progress.value = self.share
            batch = [next(chunks) for _ in range(settings.batch_size // chunk)]
            gathered = {
                name: torch.cat([part[name].to(self.device, non_blocking=True) for part in batch])
                for name in batch[0]
            }
            for _ in range(settings.uses):
                yield gathered

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss on captions and the probe's, on pictures moved and lit anew."""
        maps = random_affine(len(batch["image"]), self.device, self.generator)
        pixels = relight(warp(batch["image"], maps), self.generator)
        vision = self.reader.llava.config.vision_config
        targets = patch_targets(
            batch["glyphs"], maps, size=vision.image_size, patch=vision.patch_size
        )
        ids, positions, segments = (batch[name].long() for name in ("ids", "positions", "segments"))
        with self.autocast:
            logits, guesses = self.reader(pixels, ids, positions, segments)
        return caption_loss(logits, ids, batch["weights"]), probe_loss(guesses, targets)

    def _log(self, caption: float, letters: float) -> None:
        now = time.monotonic()
        trained = (self.step - self.first) * self.settings.batch_size / (now - self.started)
        self._write(
            share=round(self.share, 4),
            loss=round(caption, 4),
            probe_loss=round(letters, 4),
            trained_per_s=round(trained, 1),
            rendered_per_s=round(trained / self.settings.uses, 1),
            left_s=round(self.deadline - now),
        )

    def _score(self, count: int) -> None:
        if not count:
            return
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        with self.autocast:
            scores = read_scenes(
                self.reader.llava, tokenizer, "held_out", count, self.settings.assets
            )
        self._write(
            held_out_word_recall=round(scores["word_recall"], 4),
            held_out_character_error_rate=round(scores["character_error_rate"], 4),
            held_out_images=count,
        )

    def _write(self, **row: Any) -> None:
        line = json.dumps({"step": self.step, **row})
        log.info("%s", line)
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
