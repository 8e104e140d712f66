"""What README's commands cost on this machine, from a clean clone and an empty home."""

import json
import logging
import os
import platform
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from llava_ray.artifacts.code_digest import with_digests
from llava_ray.bench import results
from llava_ray.errors import ResourceError

logger = logging.getLogger(__name__)

_EVERY_S = 2.0
_STAGE_DONE = re.compile(r"INFO (\w+): done in ([\d.]+) s$")


def measure(out: Path, commands: Sequence[str]) -> Path:
    """Run the commands one after another and write a row for each; rows of others are kept.

    Memory is what the whole machine took above what it had taken before, so nothing else should
    run. Seconds of the installation's parts and of the pipeline's stages stand in `parts`;
    compiling goes on beside the downloads. Raises ResourceError for a command that fails; rows
    before it are written.
    """
    rows: dict[str, dict[str, Any]] = {}
    if out.is_file():
        earlier = with_digests(json.loads(out.read_text(encoding="utf-8")), "rows")
        rows = {row["command"]: row for row in earlier}
    memory = psutil.virtual_memory().total / 1e9
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GB of memory"
    with tempfile.TemporaryDirectory(prefix="llava_ray_clean_", ignore_cleanup_errors=True) as name:
        clone, home = Path(name) / "clone", Path(name) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "-q", ".", str(clone)], check=True)
        try:
            for command in commands:
                rows[command] = _run(command, clone, home)
                logger.info("%s", json.dumps(rows[command]))
                results.write(out, "costs", {"machine": machine, "rows": list(rows.values())})
        finally:
            # Before the folder goes: the cluster that a command has left running writes there.
            down = "[ ! -x .venv/bin/llava-ray ] || .venv/bin/llava-ray down"
            _shell(down, clone, home)
    return out


def _run(command: str, clone: Path, home: Path) -> dict[str, Any]:
    before, peak, ended = psutil.virtual_memory().used, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            peak[0] = max(peak[0], psutil.virtual_memory().used - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, started = time.monotonic(), time.time()
    code, parts = _shell(command, clone, home)
    seconds = time.monotonic() - start
    ended.set()
    watcher.join()
    if code:
        raise ResourceError(f"{command!r} ended with exit code {code}: its output stands above")
    installed = clone / ".venv" / "install.json"
    if installed.is_file() and installed.stat().st_mtime > started:
        parts = json.loads(installed.read_text(encoding="utf-8")) | parts
    du = ["du", "--summarize", "--block-size=1", str(clone.parent)]
    taken = subprocess.run(du, check=False, stdout=subprocess.PIPE, text=True).stdout
    return {
        "command": command,
        "seconds": round(seconds),
        "disk_bytes": int(taken.split()[0]),
        "memory_bytes": peak[0],
        "parts": parts,
    }


def _shell(command: str, clone: Path, home: Path) -> tuple[int, dict[str, float]]:
    """Run a command, its output passed on; return its exit code and the seconds of each stage."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    stages: dict[str, float] = {}
    with subprocess.Popen(
        ["bash", "-c", command], cwd=clone, env=kept | {"HOME": str(home), "CI": "true"}, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := _STAGE_DONE.search(line):
                key = f"{found[1]}_s"
                stages[key] = round(stages.get(key, 0.0) + float(found[2]), 1)
    return process.returncode, stages
