"""What a drill breaks, and how it is mended, as the machinery around a cluster would mend it."""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drill_network import why_no_network
from drill_nodes import HEAD, DrillCluster, wait_for
from drill_stages import STAGES, Stage

from llava_ray.errors import ResourceError

logger = logging.getLogger(__name__)

FAULTS = ("worker", "node", "head", "disk", "network", "replica")
DISK_BYTES = 400 * 2**20
_SPARE = "w3"
"""The node that comes in a lost one's place."""
_BUSY_S = 90.0
_HEAD_STARTS = 3


@dataclass(frozen=True)
class Strike:
    """What was broken."""

    struck: tuple[str, ...]
    """Titles of the processes that were lost, or what else it was."""
    node: str | None = None
    """The node that is gone."""


def why_not(fault: str) -> str | None:
    """Say why a fault cannot be made here, or None where it can."""
    if fault == "head" and shutil.which("redis-server") is None:
        return "no redis-server on this machine: install it, such as Debian's redis-server"
    if fault == "disk" and os.geteuid() != 0:
        return "mounting a small disk needs root"
    if fault == "network":
        return why_no_network()
    return None


def strike(cluster: DrillCluster, stage: Stage, fault: str, disk: Path) -> Strike:
    """Break one thing in the middle of a stage's work.

    Raises ResourceError where nothing is at work.
    """
    if fault == "head":
        return Strike(("the head", *cluster.kill(HEAD)))
    if fault == "disk":
        fill(disk)
        return Strike((f"all {DISK_BYTES} bytes of the disk are taken",))
    titles = ("ServeReplica:llava_ray:replica",) if fault == "replica" else stage.workers
    wait_for(lambda: bool(cluster.working(*titles)), _BUSY_S, f"{stage.name} has no worker")
    process, node = next(iter(cluster.working(*titles).items()))
    if fault == "node":
        return Strike((node, *cluster.kill(node)), node)
    if fault == "network":
        assert cluster.network is not None
        cluster.network.cut(node)
        return Strike((f"the cable of {node}",), node)
    title = " ".join(process.cmdline()).strip()
    process.kill()
    return Strike((title,))


def mend(cluster: DrillCluster, fault: str, hit: Strike, disk: Path) -> None:
    """Put a new node in the lost one's place, start the head again, plug in, free the disk."""
    if fault == "head":
        _restart_head(cluster)
    if fault == "disk":
        (disk / "ballast").unlink()
    if hit.node is not None:
        cluster.wait_until_dead(hit.node)
        cluster.start_node(_SPARE)
    if fault == "network" and hit.node is not None:
        assert cluster.network is not None
        cluster.network.heal(hit.node)


def _restart_head(cluster: DrillCluster) -> None:
    """Start the head until it comes up, as Kubernetes does with a container that fails."""
    for _ in range(_HEAD_STARTS - 1):
        try:
            return cluster.start_head()
        except ResourceError as error:
            logger.warning("drill: %s; it is started again", error)
            cluster.kill(HEAD)
    return cluster.start_head()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of DISK_BYTES at a folder, in memory; never the machine's own is filled.

    Raises ResourceError with mount's own words.
    """
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "drill", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ResourceError(f"no small disk at {folder}: {' '.join(done.stderr.split())}")
    try:
        yield
    finally:
        # Lazily: a process that is still ending may have a file open.
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(disk: Path) -> None:
    """Take every byte of a small disk.

    Raises ResourceError for a disk that is larger than the drill's own.
    """
    space = os.statvfs(disk)
    if space.f_blocks * space.f_frsize > DISK_BYTES:
        raise ResourceError(f"{disk} is not the drill's own small disk: it is left alone")
    with (disk / "ballast").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, space.f_bavail * space.f_frsize)


def scenarios(wanted: list[str]) -> list[tuple[str, str]]:
    """Return (stage, fault) for `train:worker`, `train` (all its faults) or nothing (all).

    Raises ResourceError for a name that is not known.
    """
    every = [(stage, fault) for stage in STAGES for fault in FAULTS if _makes_sense(stage, fault)]
    chosen = []
    for name in wanted:
        stage, _, fault = name.partition(":")
        found = [pair for pair in every if pair[0] == stage and fault in ("", pair[1])]
        if not found:
            known = ", ".join(":".join(pair) for pair in every)
            raise ResourceError(f"no drill {name!r}: {known}")
        chosen += found
    return chosen or every


def _makes_sense(stage: str, fault: str) -> bool:
    return fault != "replica" or stage == "serve"
