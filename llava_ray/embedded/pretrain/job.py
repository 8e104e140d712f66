"""What `python jobs/pretrain.py ACTION key=value ...` does.

pack       copy fonts and words to `assets`, for a machine without their packages
train      train until `minutes` are over; resumes the checkpoint in `out`
tokenizer  choose the tokens anew and write the tokenizer to `model`
export     write the checkpoint in `out` as fp16 LLaVA to `model`
score      read scenes of the words and fonts of training with `model`; write `scores`
picture    draw held-out scenes with the model's answers to `picture`
card       write the model card of `model` from `scores`, `embedded` and the log in its folder
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "model"


@dataclass(frozen=True)
class JobSettings:
    """The keys of the command line; see pretrain.PretrainSettings for those not explained here."""

    out: Path = Path("runs/pretrain")
    assets: Path | None = None
    model: Path = SHIPPED
    scores: Path = Path("jobs/results/pretrain.json")
    embedded: Path = Path("jobs/results/embedded.json")
    """Scores of held-out words and fonts, by jobs/bench/embedded.py."""
    picture: Path = Path("jobs/results/reading.png")
    images: int = 256
    """Scenes that `score` reads."""
    training: dict[str, str] = field(default_factory=dict)
    """All other keys."""


def parse_settings(pairs: Sequence[str]) -> JobSettings:
    """Read key=value pairs.

    Raises ConfigError for what is no pair.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"argument {pair!r} has no '=': write key=value")
        values[key] = value
    own: dict[str, Any] = {}
    for key in ("out", "assets", "model", "scores", "embedded", "picture"):
        if key in values:
            own[key] = Path(values.pop(key)).expanduser()
    if "images" in values:
        own["images"] = int(_number("images", values.pop("images"), int))
    return JobSettings(**own, training=values)


def _train(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.loop import PretrainSettings, pretrain

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    keys = {
        each.name: each.default
        for each in dataclasses.fields(PretrainSettings)
        if isinstance(each.default, int | float) or each.name == "max_steps"
    }
    changed: dict[str, Any] = {}
    for key, value in settings.training.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(keys))}"
            raise ConfigError(f"unknown key {key!r}{hint}")
        changed[key] = _value(key, value, keys[key])
    progress = pretrain(PretrainSettings(out=settings.out, assets=settings.assets, **changed))
    return f"{settings.out}: {progress}"


def _value(key: str, text: str, default: Any) -> bool | int | float:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"{key}={text}: write true or false")
        return text == "true"
    return _number(key, text, float if isinstance(default, float) else int)


def _number(key: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text}: not a number") from error


def _pack(settings: JobSettings) -> str:
    from llava_ray.embedded.scene_text import pack_assets

    if settings.assets is None:
        raise ConfigError("pack needs assets=FOLDER to write to")
    pack_assets(settings.assets)
    return str(settings.assets)


def _tokenizer(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.export import write_tokenizer

    write_tokenizer(settings.model)
    return str(settings.model)


def _export(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.export import export_model

    progress = export_model(settings.out, settings.model)
    return f"{settings.model}: {progress}"


def _score(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.scores import score_model

    return str(score_model(settings.model, settings.images, settings.scores, settings.assets))


def _picture(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.picture import draw_readings
    from llava_ray.embedded.scene_text import load_assets

    assets = load_assets("held_out", settings.assets)
    return str(draw_readings(settings.model, settings.picture, assets))


def _card(settings: JobSettings) -> str:
    from llava_ray.embedded.pretrain.card import write_card

    return str(write_card(settings.model, settings.scores, settings.embedded))


ACTIONS: dict[str, Callable[[JobSettings], str]] = {
    "pack": _pack,
    "train": _train,
    "tokenizer": _tokenizer,
    "export": _export,
    "picture": _picture,
    "score": _score,
    "card": _card,
}
