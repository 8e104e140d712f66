"""AutoAWQ's own versions of packages, in a folder that goes before the base environment's.

AutoAWQ 0.2.9 runs only beside transformers 4.51. What differs is installed once on each machine
(150 MB); all else, torch above all, is the base environment's, so nothing is copied.
jobs/requirements/awq.txt holds all that differs, so that pip need not resolve anything.
"""

import fcntl
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.storage import cache_folder
from llava_ray.errors import VariantError
from llava_ray.resources.crash import last_line
from llava_ray.shipped import shipped

logger = logging.getLogger(__name__)


def autoawq_folder() -> Path:
    """Return the folder with them, installed by the first that asks on this machine.

    Raises VariantError with pip's reason where they cannot be had.
    """
    locked = shipped("jobs/requirements/awq.txt").read_text(encoding="utf-8")
    key = repr((locked, platform.python_version(), platform.machine()))
    folder = cache_folder() / "autoawq" / hashlib.sha256(key.encode()).hexdigest()[:12]
    with disk_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _install(folder)
    return folder


def _install(folder: Path) -> None:
    """Install beside the place and rename, so that a folder that is there is whole."""
    logger.info("installing AutoAWQ's own packages into %s (about 20 s)", folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(draft), "--require-hashes"]
    command += ["-r", str(shipped("jobs/requirements/awq.txt"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise VariantError(
                f"AutoAWQ's environment could not be set up: {last_line(done.stderr)}"
            )
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
