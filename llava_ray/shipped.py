"""Where the job scripts, configs and cluster templates are: beside the package, or in its wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """Return the path of a file such as `cluster/local.yaml` or `jobs/configs/quickstart.yaml`."""
    in_wheel = _PACKAGE / "shipped_files" / name
    return in_wheel if in_wheel.exists() else _PACKAGE.parent / name
