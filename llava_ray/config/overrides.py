"""From YAML and `key=value` overrides to a section, every mistake said at once."""

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from llava_ray.config.section import Section
from llava_ray.errors import ConfigError
from llava_ray.shipped import or_shipped

S = TypeVar("S", bound=Section)


def load_section(kind: type[S], tree: dict[str, Any], overrides: Sequence[str]) -> S:
    """Apply `key=value` overrides to a tree and validate it.

    Raises ConfigError that lists every mistake, with the nearest known key for unknown ones.
    """
    mistakes = [m for text in overrides if (m := _apply(kind, tree, text))]
    try:
        section = kind.model_validate(tree)
    except ValidationError as error:
        mistakes += [_explain(kind, item) for item in error.errors()]
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return section


def known_keys(section: type[Section]) -> list[str]:
    """Return every dotted key, sections left out."""
    keys: list[str] = []
    for name, value in section():
        inner = type(value).model_fields if isinstance(value, Section) else None
        keys += [name] if inner is None else [f"{name}.{key}" for key in inner]
    return keys


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(or_shipped(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}: give --config an existing YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections such as 'train:'")
    return tree


def _apply(kind: type[Section], tree: dict[str, Any], text: str) -> str | None:
    """Set one override in the tree; return the mistake, if any."""
    key, equals, value = text.partition("=")
    if not equals:
        return f"override {text!r} has no '=': write key=value"
    *sections, last = key.split(".")
    parsed: Any = value
    kinds = _kinds(kind, sections, last)
    # Of a key that is a text or a list, such as resources.node_types.
    is_list = value.lstrip().startswith("[") and any(get_origin(kind) is tuple for kind in kinds)
    if str not in kinds or is_list or (value == "null" and NoneType in kinds):
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            return f"override {text!r}: the value is not YAML"
        # YAML 1.1 reads 1e-4 (without a dot) as text.
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            return f"override {text!r}: {section!r} is not a section"
        node = child
    node[last] = parsed
    return None


def _kinds(model: Any, sections: Sequence[str], last: str) -> tuple[Any, ...]:
    """Return the types that a key takes.

    A key of text takes it as typed, whatever YAML would make of it; only `null` is none, where the
    key need not be set.
    """
    for section in sections:
        found = getattr(model, "model_fields", {}).get(section)
        model = found and found.annotation
    field = getattr(model, "model_fields", {}).get(last)
    kind = None if field is None else field.annotation
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


_TYPES = {
    "tuple_type": "give a list, such as [a, b]",
    "model_type": "give a section's keys, such as section.key=value",
    "float_parsing": "give a number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "bool_parsing": "give true or false",
    "string_type": "give text",
    "string_too_short": "give text that is not empty",
}
"""Instead of pydantic's words for kinds of mistakes."""


def _explain(section: type[Section], item: Any) -> str:
    key, kind = ".".join(str(part) for part in item["loc"]), item["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(section), n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'{hint}"
    message: str = _TYPES.get(kind, item["msg"].removeprefix("Value error, "))
    if not key:
        return message
    return f"{key}: {message}" if kind == "value_error" else f"{key}={item['input']!r}: {message}"
