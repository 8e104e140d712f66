"""A dry run names what every stage asks for, and calls unknown what it cannot know (A8)."""

import json
import shutil
from pathlib import Path

import pytest

from llava_ray.config.run import load_config
from llava_ray.dry_run import describe_requests
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for

STAGES = ("prepare", "train", "merge", "quantize", "benchmark", "choose", "deploy")


def lines(*overrides: str) -> dict[str, str]:
    """Return what is said, by what it is said of."""
    text = describe_requests(load_config(None, overrides))
    assert all(line.startswith("# ") for line in text.splitlines())
    pairs = [line[2:].partition(": ")[::2] for line in text.splitlines()]
    return dict(pairs)


def test_every_stage_says_what_it_asks_for_and_how_that_is_known() -> None:
    said = lines("train.num_workers=4", "serve.gpus_per_replica=0.5")
    assert set(STAGES) <= set(said)
    assert "4 worker(s) (train.num_workers)" in said["train"]
    assert "0.5 GPUs each (serve.gpus_per_replica)" in said["deploy"]
    assert str(EMBEDDED) in said["merge"] and "unknown" not in said["merge"]
    memory = spec_for("gguf-q4_k_m").resources(22_900_000, gpu=False).memory_bytes / 2**30
    assert f"1 CPUs, {memory:.1f} GiB" in said["quantize gguf-q4_k_m"]
    assert "0.25 GPUs" in said["quantize hqq-w4-g64"]
    assert "sweep" not in said
    assert "2 draws" in lines("sweep.space={lora_r: {grid: [2, 4]}}", "sweep.num_trials=2")["sweep"]


def test_a_model_that_is_not_here_has_unknown_sizes_never_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = lines("model.path=llava-hf/llava-1.5-7b-hf")
    for name, line in said.items():
        if name.startswith(("quantize ", "merge")):
            assert "unknown: llava-hf/llava-1.5-7b-hf is not on this machine" in line
            assert "GiB" not in line and "MB" not in line
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    assert lines(f"model.path={tmp_path}")["merge"].startswith(
        f"memory unknown: {tmp_path} holds no model.safetensors"
    )


def test_a_hub_model_in_the_cache_is_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(EMBEDDED)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    there, here = lines("model.path=a/b"), lines()
    assert there["quantize awq-w4-g128"] == here["quantize awq-w4-g128"]


def test_of_a_model_that_is_partly_here_the_index_says_the_size(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    (tmp_path / "model-1-of-2.safetensors").write_bytes(
        (EMBEDDED / "model.safetensors").read_bytes()
    )
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = {"metadata": {"total_size": 14 * 2**30}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = lines(f"model.path={tmp_path}")
    assert said["merge"].startswith("35.0 GiB on one node")
    assert "1 of 2 weight files are not on this machine" in said["merge"]
    memory = spec_for("awq-w4-g128").resources(14 * 2**30, gpu=True).memory_bytes / 2**30
    assert f"{memory:.1f} GiB; size unknown: " in said["quantize awq-w4-g128"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors"])
def test_weights_that_cannot_be_read_are_unknown(tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    said = lines(f"model.path={tmp_path}")
    assert said["merge"].startswith("memory unknown: ") and str(tmp_path) in said["merge"]
    assert "GiB" not in said["merge"]
    assert said["quantize gguf-q4_k_m"].startswith("CPUs unknown; memory and size unknown: ")


@pytest.mark.parametrize(
    "config", [b"{", b"[]", b'{"model_type": "gpt2"}', b'{"model_type": "llava"}']
)
def test_a_model_that_cannot_be_used_has_no_figures(tmp_path: Path, config: bytes) -> None:
    shutil.copy(EMBEDDED / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    said = lines(f"model.path={tmp_path}")
    assert said["merge"].startswith("memory unknown: ") and "GiB" not in said["merge"]


def test_data_that_is_not_here_is_unknown(tmp_path: Path) -> None:
    assert "is not on this machine" in lines(f"data.source={tmp_path}/no.jsonl")["prepare"]
    assert "read when the stage starts" in lines("data.source=someone/captions")["prepare"]
    assert "0.0 MB" in lines("data.source=tests/data/real/captions.jsonl")["prepare"]
