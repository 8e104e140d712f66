"""What stages will need of a base model's folder, looked at before anything is spent."""

from functools import partial
from pathlib import Path

from llava_ray.errors import raise_all
from llava_ray.models.chat_template import IMAGE_TOKEN, chat_template
from llava_ray.models.family import base_error, family_of
from llava_ray.models.folder import check_model
from llava_ray.models.tensors import empty_model, is_tied, module_name, weight_shapes

_SHOWN = 3


def check_base(folder: Path) -> None:
    """Raise ConfigError that lists all that is wrong with a folder whose files can be read."""
    check_model(folder)
    raise_all(partial(look, folder) for look in (check_tokenizer, check_shapes))


def check_tokenizer(folder: Path) -> None:
    """Raise ConfigError where the tokenizer is slow, has no image token or another one than
    config.json names, or a chat template that cannot be followed."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise base_error(
            folder,
            "no tokenizer.json, the fast tokenizer: transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it",
        )
    try:
        found = Tokenizer.from_file(str(path)).token_to_id(IMAGE_TOKEN)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare Exception.
        reason = " ".join(str(error).split())[:200]
        raise base_error(folder, f"its tokenizer cannot be read ({reason})") from error
    wanted = family_of(folder).vision.image_token_id
    if found is None:
        raise base_error(
            folder,
            f"its tokenizer has no {IMAGE_TOKEN} token: add it as a "
            f"special token with the id {wanted}, config.json's image_token_index",
        )
    if found != wanted:
        raise base_error(
            folder,
            f"{IMAGE_TOKEN} is token {found} of the tokenizer and "
            f"{wanted} in config.json: set image_token_index to {found}",
        )
    chat_template(tokenizer)


def check_shapes(folder: Path) -> None:
    """Raise ConfigError where stored weights are not those that config.json describes."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        model = empty_model(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise base_error(folder, f"config.json describes no model ({reason})") from error
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    stored = {module_name(name): shape for name, shape in weight_shapes(folder).items()}
    if is_tied(config):
        expected.pop("lm_head.weight", None)
    missing = sorted(expected.keys() - stored.keys())
    other = [
        f"{name} is {list(stored[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    problems = [f"no {name}" for name in missing] + other
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise base_error(
            folder,
            f"its weights are not those of config.json: {'; '.join(problems[:_SHOWN])}{more}",
        )
