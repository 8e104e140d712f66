"""What every section of the config is made of."""

import importlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llava_ray.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


def need_package(setting: str, module: str, requirement: str) -> None:
    """Raise ConfigError where the package is missing that a setting needs.

    requirement: what pip installs it by.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{setting}: needs 'pip install {requirement}' on the driver's and the workers' image"
        ) from error
