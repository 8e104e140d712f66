"""The whole line on a real S3 server, which goes away in the middle of a stage."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, S3Server, s3_server
from tiny_run import small_model

_HOME = Path(__file__).parents[2]
_SMALL = (
    "data.source=scene-text", "data.limit=12", "train.max_steps=4", "train.num_workers=1",
    "train.cpus_per_worker=1", "train.lora_r=4", "train.lora_alpha=8", "train.max_length=512",
    "train.checkpoint_every_steps=1", "merge.probe_samples=1",
    "quantize.variants=[none-fp16,hqq-w8-g64]", "benchmark.fidelity_samples=1",
    "benchmark.caption_samples=1", "benchmark.shown_samples=1", "benchmark.max_new_tokens=8",
    "benchmark.decode_tokens=8", "benchmark.repeats=1", "benchmark.warmup=0",
    "choose.max_kl_divergence=null",
)  # fmt: skip
STAGES = ("prepare", "train", "merge", "quantize", "benchmark", "choose")
_SLOW = pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


def line(server: S3Server, model: Path, place: Path, gone: dict[str, float]) -> list[str]:
    """Run all stages up to choose; return the log. gone: for how many seconds, by stage."""
    environment = {
        **os.environ, **server.environment, "LLAVA_RAY_CACHE": str(place / "cache"),
        "PYTHONPATH": os.pathsep.join([str(_HOME), *sys.path]),
    }  # fmt: skip
    lines = []
    with subprocess.Popen(
        [sys.executable, "jobs/choose.py", f"storage.uri=s3://{BUCKET}/{place.name}",
         f"model.path={model}", *_SMALL],
        cwd=_HOME, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(text)
            for stage, seconds in gone.items():
                if text.rstrip().endswith(f"{stage}: starts"):
                    at_work = threading.Thread(target=_go, args=(server, stage, place, seconds))
                    at_work.start()
    log = "".join(lines)
    assert process.returncode == 0, log
    # Of this process; what Ray's workers say of an outage that they survive is their own.
    assert not [text for text in lines if text.startswith("Traceback")], log
    return lines


def _go(server: S3Server, stage: str, place: Path, seconds: float) -> None:
    """Let the server go a second after a stage's start, or once training has a checkpoint."""
    time.sleep(1)
    while stage == "train" and not server.counts("PUT", f"{place.name}/work/"):
        time.sleep(0.1)
    server.gone(seconds)


def test_the_line_survives_a_server_that_is_gone_for_a_moment(
    server: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B4, B10"""
    line(server, model, tmp_path, {"train": 5})
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    from llava_ray.artifacts.storage import Storage

    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    assert storage.list_folders("work") == storage.list_files(".leases") == []
    assert not list((tmp_path / "cache" / "staging").iterdir())
    copies = [path.name.rpartition("-")[0] for path in (tmp_path / "cache/artifacts").iterdir()]
    assert len(copies) == len(set(copies))


@pytest.mark.slow
@_SLOW
@pytest.mark.parametrize("stage", STAGES)
def test_the_line_survives_a_minute_without_its_server(
    server: S3Server, model: Path, tmp_path: Path, stage: str
) -> None:
    """B10"""
    start = time.monotonic()
    line(server, model, tmp_path, {stage: 60})
    assert time.monotonic() - start > 60
