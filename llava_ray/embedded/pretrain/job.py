"""What `llava-ray pretrain ACTION key=value ...` does.

pack       copy fonts and words to `assets`, for a machine without their packages
train      train until `max_steps` or the call's `minutes`; resumes the checkpoint in `out`
tokenizer  choose the tokens anew and write the tokenizer to `model`
export     write the checkpoint in `out` as fp16 LLaVA to `model`
score      read scenes of the words and fonts of training with `model`; write `scores`
picture    draw held-out scenes with the model's answers to `picture`
card       write the model card of `model` from `scores`, `embedded` and the log in its folder
"""

import logging
from pathlib import Path

from llava_ray.embedded.pretrain.card import write_card
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.embedded.scene_text import pack_assets
from llava_ray.errors import ConfigError

ACTIONS = ("card", "export", "pack", "picture", "score", "tokenizer", "train")


def run(action: str, settings: PretrainSettings) -> Path:
    """Run one of ACTIONS; return what it wrote.

    Raises ConfigError for what the action needs and does not find.
    """
    if action == "card":
        return write_card(settings.model, settings.scores, settings.embedded)
    if action == "pack":
        if settings.assets is None:
            raise ConfigError("pack needs assets=FOLDER to write to")
        return pack_assets(settings.assets)
    # Not above: card and pack need no torch.
    from llava_ray.embedded.pretrain import export, loop, scores

    match action:
        case "train":
            logging.basicConfig(
                level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
            )
            return loop.pretrain(settings)
        case "tokenizer":
            return export.write_tokenizer(settings.model)
        case "export":
            return export.export_model(settings.out, settings.model)
        case "score":
            return scores.score_model(settings)
        case "picture":
            return scores.draw_readings(settings)
    raise AssertionError(action)
