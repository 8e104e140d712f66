"""How devices are named in records: one spelling for each, so that records can be compared."""

import platform
from pathlib import Path


def device_name(device: str) -> str:
    """Return the product's name of a GPU, or of this machine's processor.

    device: such as `cuda`, `cuda:1` or `cpu`.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
