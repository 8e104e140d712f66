"""Where the job scripts, configs and cluster templates are: beside the package, or in its wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """Return the path of a file such as `cluster/local.yaml` or `jobs/configs/quickstart.yaml`."""
    in_wheel = _PACKAGE / "shipped_files" / name
    return in_wheel if in_wheel.exists() else _PACKAGE.parent / name


def or_shipped(path: Path) -> Path:
    """Return a path as it is, or the shipped file of that name where nothing is there."""
    own = shipped(str(path))
    return own if own.exists() and not path.exists() else path
