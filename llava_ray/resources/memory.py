"""What memory a machine has, and the peak of the process at hand, which a Ray worker's next variant
starts anew."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from llava_ray.errors import ResourceError
from llava_ray.resources.crash import last_line

_READ_GPU = "import torch; print(*torch.cuda.mem_get_info())"


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


def memory_bytes(device: str) -> tuple[int, int]:
    """Return what is free and what there is, of this machine or of its first visible GPU.

    Raises ResourceError where the GPU cannot be used.
    """
    if device == "cuda":
        # In a process of its own, since a CUDA context would stay in this one.
        done = subprocess.run([sys.executable, "-c", _READ_GPU], capture_output=True, text=True)
        if done.returncode:
            raise ResourceError(f"the GPU cannot be used: {last_line(done.stderr)}")
        free, total = map(int, done.stdout.split())
        return free, total
    found = psutil.virtual_memory()
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(found.total, int(text))
        return min(found.available, total - int(used.read_text())), total
    return found.available, found.total
