"""The search space: what may stand in YAML, checked before a worker is asked for."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llava_ray.config.run import RunConfig, SweepConfig, TrainConfig
from llava_ray.errors import ConfigError

_RANGES = ("uniform", "loguniform")


def check_space(config: RunConfig) -> None:
    """Raise ConfigError that lists every mistake in sweep.space."""
    mistakes = [
        f"sweep.space.{key}: {mistake}"
        for key, entry in config.sweep.space.items()
        if (mistake := _mistake(config.train, key, entry, config.sweep))
    ]
    if not config.sweep.space:
        mistakes.append("sweep.space is empty: name keys of train, such as learning_rate")
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def _mistake(train: TrainConfig, key: str, entry: Any, sweep: SweepConfig) -> str | None:
    if key not in TrainConfig.model_fields:
        near = difflib.get_close_matches(key, TrainConfig.model_fields, n=1, cutoff=0.5)
        return "train has no such key" + (f"; did you mean '{near[0]}'?" if near else "")
    kind, *others = entry if isinstance(entry, Mapping) and entry else (None,)
    if others or kind not in ("grid", "choice", *_RANGES):
        forms = "{grid|choice: [...]}, {uniform|loguniform: [low, high]}"
        return f"{entry!r} is not one of {forms}"
    values = entry[kind]
    if not isinstance(values, list) or not values:
        return f"{kind} needs a list, not {values!r}"
    if kind in _RANGES:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if len(values) != 2 or not numbers or not values[0] < values[1]:
            return f"{kind} needs [low, high] with low < high, not {values!r}"
        if kind == "loguniform" and values[0] <= 0:
            return f"loguniform needs positive bounds, not {values!r}"
    if kind == "grid" and (sweep.search == "optuna" or sweep.scheduler == "pbt"):
        return "optuna and pbt draw samples: use choice in place of grid"
    for value in values:
        try:
            with_settings(train, {key: value})
        except ConfigError as error:
            return str(error)
    return None


def with_settings(train: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Return a train section with some keys replaced.

    Raises ConfigError when the result is not valid.
    """
    try:
        return TrainConfig.model_validate(train.model_dump() | dict(settings))
    except ValidationError as error:
        mistake = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{dict(settings)}: {mistake}") from error


def domains(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the space in Ray Tune's terms."""
    from ray import tune

    lists: dict[str, Any] = {"grid": tune.grid_search, "choice": tune.choice}
    ranges: dict[str, Any] = {"uniform": tune.uniform, "loguniform": tune.loguniform}
    return {
        key: lists[kind](values) if kind in lists else ranges[kind](*values)
        for key, entry in space.items()
        for kind, values in entry.items()
    }


def num_samples(sweep: SweepConfig) -> int:
    """Return how often the space is drawn from: a grid alone is walked once."""
    only_grid = all("grid" in entry for entry in sweep.space.values())
    return 1 if only_grid else sweep.num_trials
