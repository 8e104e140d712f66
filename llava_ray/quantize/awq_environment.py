"""AutoAWQ's own versions of packages, in a folder that goes before the base environment's.

AutoAWQ 0.2.9 runs only beside transformers 4.51. What differs is installed once on each machine
(150 MB); all else, torch above all, is the base environment's, so nothing is copied.
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

from llava_ray.artifacts.storage import cache_folder, disk_errors
from llava_ray.errors import VariantError
from llava_ray.resources.crash import last_line

logger = logging.getLogger(__name__)

PACKAGES = (
    "autoawq==0.2.9",
    "transformers==4.51.3",
    "datasets==3.6.0",
    "dill==0.3.8",
    "fsspec==2025.3.0",
    "huggingface_hub==0.36.2",
    "multiprocess==0.70.16",
    "tokenizers==0.21.4",
    "zstandard==0.25.0",
)
"""All that differs from the base environment, so that pip need not resolve anything."""


def autoawq_folder() -> Path:
    """Return the folder with PACKAGES, installed by the first that asks on this machine.

    Raises VariantError with pip's reason where they cannot be had.
    """
    told = repr((PACKAGES, platform.python_version(), platform.machine()))
    folder = cache_folder() / "autoawq" / hashlib.sha256(told.encode()).hexdigest()[:12]
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
    command += ["--disable-pip-version-check", "--target", str(draft), *PACKAGES]
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
