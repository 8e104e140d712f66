"""The file that a benchmark writes: its figures, and the machine and code they rest on."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.resources.devices import device_name

PACKAGES = (
    "torch", "transformers", "peft", "deepspeed", "liger_kernel", "triton", "ray", "bitsandbytes",
)  # fmt: skip


def head(name: str, device: str = "cpu") -> dict[str, Any]:
    """Return the device, versions, command and code that measure.

    name: an entry of code_digest.ENTRIES. device: such as `cuda` or `cpu`.
    """
    # Paths of this machine say nothing elsewhere.
    arguments = (each if not Path(each).is_absolute() else Path(each).name for each in sys.argv)
    return {
        "device": device_name(device),
        "versions": {"python": platform.python_version()}
        | {found.name: found.version for found in distributions() if found.name in PACKAGES},
        "command": shlex.join(["python", *arguments]),
        "code_digest": code_digest(name),
    }


def write(out: Path, name: str, tree: Mapping[str, Any], device: str = "cpu") -> Path:
    """Write JSON: `tree` below its head."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head(name, device), **tree}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    return out
