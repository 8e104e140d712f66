"""Read a cluster YAML and check it against the schema of the installed Ray."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llava_ray.errors import ConfigError
from llava_ray.shipped import or_shipped


def read_cluster(path: Path) -> dict[str, Any]:
    """Return the tree of a Ray cluster YAML.

    Raises ConfigError with every mistake that Ray's own schema has against it.
    """
    from jsonschema import Draft7Validator

    documents = read_documents(path)
    tree = documents[0] if len(documents) == 1 else documents
    mistakes = [
        f"{'.'.join(map(str, error.path)) or 'the file'}: {error.message}"
        for error in Draft7Validator(_ray_schema()).iter_errors(tree)
    ]
    if mistakes:
        raise ConfigError(f"{path}: {'; '.join(mistakes)}")
    return dict(tree)


def read_documents(path: Path) -> list[Any]:
    """Return what a YAML file holds.

    Raises ConfigError where it cannot be read.
    """
    try:
        return list(yaml.safe_load_all(or_shipped(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"no cluster YAML at {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


@cache
def _ray_schema() -> dict[str, Any]:
    import ray.autoscaler

    path = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))
