"""Peak memory of the process at hand, which a Ray worker's next variant starts anew."""

import re
import resource
from pathlib import Path


def reset_peaks(device: str) -> None:
    """Start to measure anew; where there is no /proc the process's own peak stays."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
    # Linux: 5 resets VmHWM (proc(5)).
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")


def host_peak_bytes() -> int:
    """Return the most memory that was resident, pages of mapped files counted in."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(device: str) -> int:
    """Return the most memory that was allocated on a GPU, or resident where there is none."""
    if not device.startswith("cuda"):
        return host_peak_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)
