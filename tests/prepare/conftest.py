import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config.run import RunConfig, load_config


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(source: Path | str, **data: Any) -> RunConfig:
        overrides = [
            f"data.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in data.items()
        ]
        return load_config(
            None, [f"storage.uri={tmp_path / 'runs'}", f"data.source={source}", *overrides]
        )

    return make


@pytest.fixture(autouse=True)
def on_ray(ray_local: None) -> None:
    """Rows are checked by Ray."""
