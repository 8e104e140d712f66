"""train.run on Ray: two workers, one of which is killed in the middle."""

import contextlib
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_ray import train
from llava_ray.artifacts import identity
from llava_ray.artifacts.records import AdapterCheckpoint
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.config.run import changed
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.merge.fold import adapted_model
from llava_ray.models.folder import model_folder
from llava_ray.train.trackers import read_metrics
from llava_ray.train.unfinished import last_checkpoint

SLOW = pytest.mark.skipif(
    not os.environ.get("LLAVA_RAY_SLOW"), reason="takes minutes: set LLAVA_RAY_SLOW=1"
)


def kill_a_worker_after_a_checkpoint(
    work: Path, killed: list[int], proof: str = "checkpoint_*/state.json"
) -> None:
    """Send SIGKILL to a training worker of this session's Ray once a checkpoint is there."""
    import psutil

    deadline = time.monotonic() + 120
    while not list(work.glob(f"adapter-*/checkpoints/{proof}")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline()[:1])
    ]
    workers[0].send_signal(signal.SIGKILL)
    killed.append(workers[0].pid)


def check_card(folder, config) -> None:
    """E7: an adapter's card has base, data and settings; its code merges as the stage does."""
    card = (folder / "adapter" / "README.md").read_text()
    assert "# lora on " in card and "rows of " in card and "- `num_workers`: `2`" in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    with contextlib.chdir(folder / "adapter"):
        exec(code, found)
    expected = adapted_model(model_folder(config.model), folder).merge_and_unload().state_dict()
    merged = found["model"].state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_a_killed_worker_costs_at_most_one_checkpoint_interval(ray_local, bench, runs) -> None:
    """The run must end where `two_long`, the same run without Ray and uninterrupted, ended."""
    from conftest import LONG

    config = bench.config(
        *LONG, "train.num_workers=2", "train.batch_size=1", "train.trackers=[tensorboard]",
        "train.zero_stage=2",
    )  # fmt: skip
    killed: list[int] = []
    watch = threading.Thread(
        target=kill_a_worker_after_a_checkpoint, args=(bench.root / "store" / "work", killed)
    )
    watch.start()
    record = train.run(config, bench.dataset)
    watch.join()
    assert killed
    assert isinstance(record, AdapterCheckpoint)
    assert (record.steps, record.num_workers) == (4, 2)
    folder = local_folder(record)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    expected = read_metrics(runs / "two_long" / "step_4" / "metrics.jsonl")
    assert [x["loss"] for x in lines if "loss" in x] == [x["loss"] for x in expected if "loss" in x]
    assert record.eval_loss == expected[-1]["eval_loss"]
    assert record.train_loss == lines[3]["loss"]
    found = {name for name in record.files if not name.startswith("tensorboard/")}
    assert found >= {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "curve.png",
        "metrics.jsonl", "projector.safetensors",
    }  # fmt: skip
    assert any("tfevents" in name for name in record.files)
    check_card(folder, config)
    assert not list((bench.root / "store" / "work").glob("adapter-*"))
    assert train.run(config, bench.dataset).created == record.created


def test_a_run_of_other_libraries_is_offered_and_gone_on_with(
    ray_local, bench, monkeypatch, caplog
) -> None:
    config = bench.config(
        "train.max_steps=6", "train.checkpoint_every_steps=1", "train.zero_stage=0",
        "train.max_failures=0", "train.seed=5",
    )  # fmt: skip
    work, killed = bench.root / "store" / "work", list[int]()
    # Which Ray Train writes once it knows the checkpoint.
    proof = "checkpoint_manager_snapshot.json"
    watch = threading.Thread(target=kill_a_worker_after_a_checkpoint, args=(work, killed, proof))
    watch.start()
    with pytest.raises(ResourceError, match="the same command goes on from the last"):
        train.run(config, bench.dataset)
    watch.join()
    (left,) = work.glob("adapter-*")
    saved = last_checkpoint(ArtifactStore(config.storage.uri), left.name)
    lines = read_metrics(Path(saved) / "metrics.jsonl")

    monkeypatch.setattr(identity, "version", lambda name: "0.0.1")
    with caplog.at_level(logging.WARNING):
        anew = train.run(config, bench.dataset)
    (offered,) = (line for line in caplog.messages if "--resume" in line)
    assert f"give --resume {left.name}" in offered and 'versions.torch: "' in offered
    assert "learning_rate" not in offered
    wider = changed(config, train={"resume_from": left.name, "lora_r": 8})
    with pytest.raises(ConfigError, match="begun with other settings .settings.train.lora_r: 4"):
        train.run(wider, bench.dataset)
    resumed = train.run(changed(config, train={"resume_from": left.name}), bench.dataset)
    assert resumed.id != anew.id and resumed.steps == 6
    assert read_metrics(local_folder(resumed) / "metrics.jsonl")[: len(lines)] == lines
    assert not list(work.glob("adapter-*"))
    # Asked for as it is, without --resume.
    shutil.rmtree(Path(anew.uri))
    assert train.run(config, bench.dataset) == resumed

    other = changed(config, train={"resume_from": "adapter-abc", "seed": 6})
    with pytest.raises(ConfigError, match=r"train.resume_from='adapter-abc': no checkpoint.*none"):
        train.run(other, bench.dataset)


def test_more_workers_than_the_cluster_holds_are_refused_at_once(ray_local, bench) -> None:
    with pytest.raises(ResourceError, match=r"train\.num_workers=64"):
        train.run(bench.config("train.num_workers=64"), bench.dataset)


def test_a_run_without_a_logged_step_ends_as_any_other(ray_local, bench) -> None:
    settings = ("train.max_steps=3", "train.zero_stage=0", "train.seed=1")
    losses = [
        train.run(bench.config(*settings, f"train.log_every_steps={every}", storage), bench.dataset)
        for every, storage in (
            (1, f"storage.uri={bench.root}/a"),
            (1000, f"storage.uri={bench.root}/b"),
        )
    ]
    assert losses[0].train_loss == losses[1].train_loss
    assert losses[0].eval_loss == losses[1].eval_loss


@SLOW
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(ray_local, bench) -> None:
    config = bench.config(
        "train.learning_rate=1e18", "train.projector_learning_rate=1e18", "train.max_steps=6",
        "train.warmup_ratio=0",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="lower .*learning_rate"):
        train.run(config, bench.dataset)


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("train.method=qlora",),
        ("train.method=hqq", "train.hqq_bits=3"),
        ("train.method=full",),
        ("train.use_dora=true",),
        ("train.use_rslora=true",),
        ("train.offload=optimizer",),
        ("train.loader_workers=1",),
        ("train.zero_stage=0", "train.optimizer=adamw8bit"),
        (
            "train.zero_stage=0",
            "train.optimizer=galore",
            "train.method=full",
            "train.galore_rank=8",
        ),
    ],
    ids=str,
)
def test_methods_train_and_merge(ray_local, bench, overrides: tuple[str, ...]) -> None:
    from llava_ray import merge

    config = bench.config(
        *overrides, "train.max_steps=12", "train.batch_size=4", "train.learning_rate=1e-2",
        "train.checkpoint_every_steps=12",
    )  # fmt: skip
    adapter = train.run(config, bench.dataset)
    first = read_metrics(local_folder(adapter) / "metrics.jsonl")[0]["loss"]
    assert adapter.train_loss < 0.9 * first
    assert merge.run(config, adapter).max_logit_difference < 1e-3
