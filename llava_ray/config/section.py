"""What every section of the config is made of."""

import importlib
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llava_ray.errors import ConfigError


def _number(value: Any) -> Any:
    """Refuse what Python would take for 0 or 1."""
    if isinstance(value, bool):
        raise ValueError(f"needs a number, not {str(value).lower()}")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Integer = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Integer, Field(ge=1)]
Natural = Annotated[Integer, Field(ge=0)]


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
