"""The training loop of one rank, and the function by which Ray Train runs it.

Learning rate, dropout and the order of the data follow from the step alone, so a resumed run
needs only the weights, AdamW's moments and the cursor.
"""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from llava_ray.artifacts.records import DatasetRecord, Frozen
from llava_ray.config.run import RunConfig
from llava_ray.console import Progress
from llava_ray.models import low_bits
from llava_ray.models.chat_template import base_tokenizer
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.dataset import Split, open_split
from llava_ray.models.family import family_of
from llava_ray.models.folder import max_positions, model_folder
from llava_ray.resources.devices import device_name
from llava_ray.resources.memory import peak_bytes
from llava_ray.train import adapt, checkpoint, replica, zero
from llava_ray.train.batches import (
    Batch,
    CaptionSamples,
    StreamOrder,
    eval_batches,
    rank_batches,
    train_batches,
)
from llava_ray.train.checkpoint import TrainState
from llava_ray.train.trackers import METRICS, Log, open_trackers, read_metrics, write_metrics

logger = logging.getLogger(__name__)

_SHOWN_CUTS = 5
"""Ids that are shown of samples that are cut."""
_CUT = "cut.json"


class WorkerTask(Frozen):
    """All that a worker needs to know."""

    run_id: str
    config: RunConfig
    dataset: DatasetRecord
    live_folder: str | None
    """Where trackers write while the run lasts; None: a folder of the worker."""
    start_from: str | None = None
    """A checkpoint of another run to begin with."""
    export_always: bool = False
    """Put the adapter into every checkpoint, not only into the last."""


@dataclass(frozen=True)
class DistributedContext:
    """Which of how many ranks this is, on what device, and where its reports go."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[dict[str, Any], Path | None], None]
    """Takes values, and the folder with this rank's part of a checkpoint where one is made."""


def train_worker(task: WorkerTask) -> None:
    """Train to the end, from the last checkpoint if there is one; Ray Train runs this."""
    import ray.train
    import ray.train.torch

    def report(values: dict[str, Any], folder: Path | None) -> None:
        # Every rank reports; Ray merges the files of all into one checkpoint.
        made = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report(values, checkpoint=made)

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    distributed = DistributedContext(
        context.get_world_rank(), context.get_world_size(), device, report
    )
    start = ray.train.get_checkpoint()
    if start is None and task.start_from is not None:
        start = ray.train.Checkpoint(task.start_from)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(start.as_directory())) if start else None
        Loop(task, distributed, folder).run()


class _Diverged(Exception):
    """A loss is no longer a finite number; all ranks see it at the same step."""


class Loop:
    """One rank's training loop."""

    def __init__(
        self, task: WorkerTask, distributed: DistributedContext, resume_from: Path | None
    ) -> None:
        self.task, self.distributed = task, distributed
        train = task.config.train
        stage = train.stage_for(distributed.world_size)
        self.train = train.model_copy(update={"zero_stage": stage})
        self.rank, self.world_size = distributed.rank, distributed.world_size
        self.device = distributed.device
        self.gpu = self.device.type == "cuda"
        self.precision: zero.Precision = "bf16" if self.gpu else "fp32"
        if self.train.precision != "auto":
            self.precision = self.train.precision
        zero.prepare_environment(gpu=self.gpu)
        self.data = self._samples()
        self.held_out = replace(self.data, split=self._split("test"))
        self._check_lengths()
        self.engine = self._engine()
        self.base_rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.metrics: list[dict[str, float]] = []
        """The lines of metrics.jsonl, which travel in every checkpoint."""
        self.state = self._first_state()
        self.unread: tuple[torch.Tensor, float] | None = None
        """The last step's summed loss, still on the device, and its number of tokens."""
        if resume_from is not None:
            self.state = checkpoint.read_state(resume_from)
            checkpoint.load_state(self.engine, resume_from, self.state)
            if self.rank == 0:
                self.metrics = read_metrics(resume_from / METRICS)
                logger.info("train: resumed at step %d", self.state.step)
        self.total_steps = -(-self.state.total_samples // self.per_step)
        self.rate_factor = adapt.rate_factor(self.train, self.total_steps)
        self.trackers: list[Log] = []
        self.bytes_read = 0
        """Of rows and pictures of this rank's batches, those that are fetched ahead among them."""

    @property
    def per_step(self) -> int:
        """Samples of one optimizer step on all workers."""
        micro: int = self.train.batch_size * self.world_size
        return micro * self.train.gradient_accumulation

    def run(self) -> None:
        """Step until the stream's last sample, then export and report the final checkpoint."""
        with contextlib.ExitStack() as stack:
            if self.rank == 0:
                folder = self.task.live_folder or stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="llava_ray_")
                )
                self.trackers = open_trackers(
                    stack, self.train, self.task.run_id, Path(folder), self.state.step + 1
                )
            try:
                self._run_steps()
                self._report(self._evaluate(), save=True, final=True)
            except _Diverged:
                self._report({"diverged": True, "eval_loss": math.nan})

    def _run_steps(self) -> None:
        batches = self._batches()
        save_every = self.train.checkpoint_every_steps or max(1, self.total_steps // 10)
        eval_every = self.train.eval_every_steps
        first = self.state.samples
        progress = Progress("train", self.state.total_samples - first, "samples")
        while self.state.samples < self.state.total_samples:
            lap = time.monotonic()
            values = self._step(batches)
            self.state.step += 1
            self.state.samples += self.per_step
            self.state.train_s += time.monotonic() - lap
            step = self.state.step
            evaluate = bool(eval_every and step % eval_every == 0)
            save = evaluate or step % save_every == 0
            if save or values is not None:
                self._read_loss()
            if values is not None:
                self._log(step, values)
                if self.rank == 0:
                    note = f"loss {values['loss']:.4f}, {values['samples_per_s']:.2f} samples/s"
                    progress.at(self.state.samples - first, f"step {step}, {note}")
            if save and self.state.samples < self.state.total_samples:
                self._report(self._evaluate() if evaluate else {}, save=True)
        if not self.state.tail_steps:
            raise _Diverged
        megabytes = self.bytes_read / 1e6, self.task.dataset.size_bytes / 1e6
        logger.info("train: worker %d read %.1f MB of a data set of %.1f MB", self.rank, *megabytes)

    def _check_lengths(self) -> None:
        """Say which samples are cut, before an hour is spent on their beginnings."""
        self.cut = self.data.check_room()
        if self.cut and self.rank == 0:
            logger.warning(
                "train: max_length=%d cuts %d of %d samples, first %s; the adapter's %s lists all",
                self.data.max_length, len(self.cut), len(self.data),
                ", ".join(self.cut[:_SHOWN_CUTS]), _CUT,
            )  # fmt: skip

    def _split(self, name: str) -> Split:
        data = self.task.config.data
        return open_split(self.task.dataset, name, cache_bytes=data.cache_bytes)

    def _samples(self) -> CaptionSamples:
        folder = model_folder(self.task.config.model)
        longest = max_positions(folder)
        if self.train.max_length > longest and self.rank == 0:
            logger.warning("train: max_length is the model's %d, not more", longest)
        return CaptionSamples(
            split=self._split("train"),
            tokenizer=base_tokenizer(folder),
            family=family_of(folder),
            max_length=min(self.train.max_length, longest),
            max_image_pixels=self.task.config.data.max_image_pixels,
            system=self.task.config.model.system_prompt,
        )

    def _engine(self) -> Any:
        config = zero.zero_config(self.train, self.precision, gpu=self.gpu)
        # While this object lives, from_pretrained shards each weight as it is read; without it
        # every rank of ZeRO-3 would hold the whole model in RAM.
        shards = None
        if self.train.zero_stage == 3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            shards = HfDeepSpeedConfig(config)  # type: ignore[no-untyped-call]
        torch.manual_seed(self.train.seed)
        model = adapt.load_base(
            model_folder(self.task.config.model),
            dtype=zero.torch_dtype(self.precision),
            device=None if shards else str(self.device),
            nf4=self.train.method == "qlora",
        )
        if self.train.method == "hqq":
            low_bits.quantize_base(
                model, bits=self.train.hqq_bits, group_size=self.train.hqq_group_size
            )
        # Seeded again: every rank and every restart must draw the same LoRA weights.
        torch.manual_seed(self.train.seed)
        model = adapt.adapt(model, self.train)
        groups = adapt.parameter_groups(model, self.train)
        module = adapt.loss_module(model, self.train)
        if self.train.zero_stage == 0:
            dtype = zero.torch_dtype(self.precision)
            return replica.ReplicaEngine(module, groups, self.train, dtype)
        engine = zero.make_engine(module, groups, config)
        del shards
        return engine

    def _first_state(self) -> TrainState:
        total = int(self.train.epochs * self._order(self.per_step).epoch_length)
        if self.train.max_steps is not None:
            total = min(total, self.train.max_steps * self.per_step)
        return TrainState(total_samples=max(1, total), group=self.per_step)

    def _order(self, group: int) -> StreamOrder:
        return StreamOrder(
            lengths=tuple(self.data.split.letters.tolist()),
            seed=self.train.seed,
            group=group,
            by_length=self.train.group_by_modality_length,
        )

    def _batches(self) -> Iterator[Batch]:
        order = self._order(self.state.group)
        workers = self.train.loader_workers
        if workers is None:
            workers = 4 if self.gpu else 0
        mine = self._counted(
            rank_batches(
                order, self.state.samples, self.train.batch_size, self.rank, self.world_size
            )
        )
        return train_batches(self.data, mine, loader_workers=workers, pin_memory=self.gpu)

    def _counted(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        for batch in batches:
            self.bytes_read += int(self.data.split.num_bytes[batch].sum())
            yield batch

    def _step(self, batches: Iterator[Batch]) -> dict[str, float] | None:
        """Take one optimizer step; return its measurements where they are logged."""
        step = self.state.step
        # Not the step: after a resume with other workers a step has another size.
        factor = self.rate_factor(self.state.samples // self.per_step)
        for group, rate in zip(self.engine.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        # Dropout follows from seed, step and rank, so a resumed run draws the same.
        torch.manual_seed(hash((self.train.seed, step, self.rank)) & 0x7FFFFFFF)
        start = time.monotonic()
        micro = [next(batches) for _ in range(self.train.gradient_accumulation)]
        counts = torch.tensor(
            [
                sum(_supervised(b) for b in micro),
                sum(int(b["attention_mask"].sum()) for b in micro),
            ],
            device=self.device,
        )
        torch.distributed.all_reduce(counts)
        supervised, tokens = counts.tolist()
        # Reading the counts waited for the last step, so its loss costs no wait of its own.
        self._read_loss()
        total = torch.zeros((), device=self.device)
        # DeepSpeed averages over workers and micro-batches; a caption's weight in the step is its
        # number of tokens, whichever worker has it.
        scale = self.world_size * self.train.gradient_accumulation / max(1, supervised)
        for batch in micro:
            loss = self.engine(**self._to_device(batch))
            self.engine.backward(loss * scale)
            self.engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        self.unread = total, max(1, supervised)
        last = self.state.samples + self.per_step >= self.state.total_samples
        if (step + 1) % self.train.log_every_steps and not last:
            return None
        norm = self.engine.get_global_grad_norm()
        values = {
            "loss": float(total) / max(1, supervised),
            "lr": self.train.learning_rate * factor,
            "projector_lr": self.train.projector_learning_rate * factor,
            "grad_norm": float(norm) if norm is not None else 0.0,
            "tokens": tokens,
            "supervised_tokens": supervised,
        }
        return values | {"samples_per_s": self.per_step / (time.monotonic() - start)}

    def _read_loss(self) -> None:
        """Take the last step's loss, the same number on every rank, into the state."""
        if self.unread is None:
            return
        (total, tokens), self.unread = self.unread, None
        loss = float(total) / tokens
        if not math.isfinite(loss):
            # DeepSpeed leaves out an fp16 step that overflows and scales the next ones down.
            if self.precision == "fp16":
                return
            raise _Diverged
        self.state.loss = loss
        left = -(-(self.state.total_samples - self.state.samples) // self.per_step)
        if left < max(1, self.total_steps // 10):
            self.state.tail_loss += loss
            self.state.tail_steps += 1

    def _evaluate(self) -> dict[str, float]:
        """Return the held-out loss, in nats per supervised token over all workers."""
        if not len(self.held_out):
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        with torch.no_grad():
            for batch in eval_batches(
                self.held_out, batch_size=self.train.eval_batch_size, rank=self.rank,
                world_size=self.world_size,
            ):  # fmt: skip
                sums[0] += self.engine(**self._to_device(batch)).double()
                sums[1] += _supervised(batch)
        self.engine.module.train()
        torch.distributed.all_reduce(sums)
        values = {"eval_loss": float(sums[0] / sums[1].clamp(min=1))}
        if not math.isfinite(values["eval_loss"]):
            raise _Diverged
        self._log(self.state.step, values)
        return values

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.metrics.append({"step": step, **values})
        for log in self.trackers:
            log(step, values)

    def _report(self, values: dict[str, Any], *, save: bool = False, final: bool = False) -> None:
        """Report from every rank, with this rank's part of a checkpoint if one is to be made."""
        values = {"step": self.state.step, "loss": self.state.loss, **values}
        if final:
            values["device"] = device_name(str(self.device))
            values["train_loss"] = self.state.train_loss
            values["samples_per_s"] = self.state.samples_per_s
            values["peak_memory_bytes"] = peak_bytes(self.device.type)
        with tempfile.TemporaryDirectory(prefix="llava_ray_") as name:
            folder = Path(name)
            if not save:
                self.distributed.report(values, None)
                return
            if self.precision == "fp16":
                self.state.loss_scale = float(self.engine.optimizer.loss_scaler.cur_scale)
            checkpoint.save_state(
                self.engine, folder, self.state, rank=self.rank, world_size=self.world_size
            )
            if final or self.task.export_always:
                path = self.task.config.model.path
                checkpoint.export(self.engine, folder / "artifact", base_model=path, rank=self.rank)
                if self.cut and self.rank == 0:
                    (folder / "artifact" / _CUT).write_text(json.dumps(self.cut, indent=1))
            if self.rank == 0:
                write_metrics(self.metrics, folder / METRICS)
            self.distributed.report(values, folder)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _supervised(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
