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

from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.errors import ConfigError

ACTIONS = ("card", "export", "pack", "picture", "score", "tokenizer", "train")


def run(action: str, settings: PretrainSettings) -> Path:
    """Run one of ACTIONS; return what it wrote.

    Raises ConfigError for what the action needs and does not find.
    """
    # Each branch imports for itself: card and pack need no torch.
    match action:
        case "pack":
            from llava_ray.embedded.scene_text import pack_assets

            if settings.assets is None:
                raise ConfigError("pack needs assets=FOLDER to write to")
            return pack_assets(settings.assets)
        case "train":
            from llava_ray.embedded.pretrain.loop import pretrain

            logging.basicConfig(
                level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
            )
            return pretrain(settings)
        case "tokenizer":
            from llava_ray.embedded.pretrain.export import write_tokenizer

            return write_tokenizer(settings.model)
        case "export":
            from llava_ray.embedded.pretrain.export import export_model

            return export_model(settings.out, settings.model)
        case "score":
            from llava_ray.embedded.pretrain.scores import score_model

            return score_model(settings.model, settings.images, settings.scores, settings.assets)
        case "picture":
            from llava_ray.embedded.pretrain.picture import draw_readings

            return draw_readings(settings.model, settings.picture, settings.assets)
        case "card":
            from llava_ray.embedded.pretrain.card import write_card

            return write_card(settings.model, settings.scores, settings.embedded)
    raise AssertionError(action)
