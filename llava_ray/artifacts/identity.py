"""What an artifact's id is made of beside its settings: the code's revision and its libraries.

`python -m llava_ray.artifacts.identity` takes today's code over as without effect on what comes
out; where it has one, the revision of its kind is raised first. A test asks for either.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import digest_of
from llava_ray.shipped import shipped

REVISIONS: Mapping[str, int] = {
    "dataset": 6, "adapter": 4, "sweep": 2, "merged": 3, "variant": 6, "quantization": 3,
    "reference": 3, "scorecard": 2, "chosen": 2, "deployment": 1,
}  # fmt: skip
"""By kind of artifact. A higher one makes other ids, so that older artifacts are not found."""

_CODE: Mapping[str, tuple[str, ...]] = {
    "dataset": ("llava_ray.prepare",),
    "adapter": ("llava_ray.train",),
    "sweep": ("llava_ray.sweep",),
    "merged": ("llava_ray.merge",),
    # The second is run by its name, so that no import leads to it.
    "variant": ("llava_ray.quantize", "llava_ray.quantize.awq_calibration"),
    "scorecard": ("llava_ray.benchmark",),
    "chosen": ("llava_ray.choose",),
    "deployment": ("llava_ray.deploy",),
}
_SHARED = {"quantization": "variant", "reference": "scorecard"}
"""Kinds that the code of another makes."""
DIGESTS = Path(__file__).with_name("digests.json")


def artifact_id(kind: str, settings: Mapping[str, Any], parents: Sequence[str] = ()) -> str:
    """Derive an id from what shapes an artifact: `<kind>-<12 hex digits>`."""
    parts = [kind, REVISIONS.get(kind), settings, list(parents)]
    text = json.dumps(parts, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def kind_digest(kind: str) -> str:
    """Return the digest of the code that makes a kind of artifact, and of all that it imports."""
    return digest_of(_CODE[_SHARED.get(kind, kind)])


def versions(*packages: str) -> dict[str, str]:
    """Return the packages' versions, those that are not installed here as the requirements lock
    them.

    A build for one kind of GPU counts as the version that it is a build of.
    """
    return {name: _version(name).partition("+")[0] for name in packages}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        lock = shipped(f"jobs/requirements/linux-{platform.machine()}.txt")
        lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
        found = (line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))
        return next(found, "none").split()[0]


def today() -> dict[str, dict[str, Any]]:
    """Return what DIGESTS holds when it is taken over."""
    return {
        kind: {"revision": REVISIONS[kind], "digest": kind_digest(kind)} for kind in sorted(_CODE)
    }


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(today(), indent=1) + "\n", encoding="utf-8")
    print(DIGESTS)
