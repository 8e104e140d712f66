"""The shipped model's card, filled in from its scores."""

import json
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import CARD
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.errors import ConfigError
from llava_ray.models.folder import weights_sha256

LOG = "pretrain_log.jsonl"


def write_card(folder: Path, scores: Path, embedded: Path) -> Path:
    """Write the model card from the scores and from the training's log in the model's folder.

    `scores` is what score_model wrote, `embedded` what llava_ray.bench.embedded wrote of held-out
    words and fonts. Raises ConfigError where one is missing or is of other weights.
    """
    if not (folder / LOG).is_file():
        raise ConfigError(f"the card needs {folder / LOG}, which is missing")
    own, held_out = (_read(path, weights_sha256(folder)) for path in (scores, embedded))
    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        settings=PretrainSettings(),
        last=rows[-1],
        paced=[row for row in rows if "trained_per_s" in row][-1],
        own=own,
        held_out=held_out,
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def _read(path: Path, weights: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"the card needs {path}, which is missing")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree["base_model_sha256"] != weights:
        raise ConfigError(f"{path} is of other weights than the model's: score the model anew")
    return tree
