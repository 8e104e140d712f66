"""What stages will need of a base model's folder, looked at before anything is spent."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from llava_ray.errors import ConfigError, said_by
from llava_ray.models.chat_template import (
    IMAGE_TOKEN,
    Turn,
    base_tokenizer,
    chat_template,
    control_tokens,
)
from llava_ray.models.conversation import encode_prompt
from llava_ray.models.family import base_error, family_of
from llava_ray.models.folder import check_files, check_weights
from llava_ray.models.tensors import empty_model, is_tied, module_name, weight_shapes

_SHOWN = 3
_OF_A_LAYER = re.compile(r"\.layers\.\d+\..*(weight|bias)$|lora_")
"""Of what config.json does not describe: layers left out, or an adapter that was not merged."""


def check_base(folder: Path) -> None:
    """Raise ConfigError that lists all that is wrong with a folder whose files can be read."""
    shapes = [*said_by(partial(look, folder) for look in (family_of, check_weights))]
    others = (check_files, check_tokenizer, check_generation)
    mistakes = shapes + [*said_by(partial(look, folder) for look in others)]
    if not shapes:
        mistakes += said_by([partial(check_shapes, folder)])
    if mistakes:
        # Several look into the same files.
        raise ConfigError("; ".join(dict.fromkeys(mistakes)))


def check_generation(folder: Path) -> None:
    """Raise ConfigError for a generation_config.json that transformers does not read and write."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        with TemporaryDirectory() as scratch:
            GenerationConfig.from_pretrained(folder).save_pretrained(scratch)
    except Exception as error:  # It raises whatever a value leads to.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise base_error(
            folder, f"generation_config.json is refused ({reason}): mend or delete it"
        ) from error


def check_tokenizer(folder: Path) -> None:
    """Raise ConfigError where the tokenizer is slow, has no image token or another one than
    config.json names, or a chat template that cannot be followed."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise base_error(
            folder,
            "no tokenizer.json, the fast tokenizer: transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it",
        )
    read_config(folder)
    try:
        found = Tokenizer.from_file(str(path)).token_to_id(IMAGE_TOKEN)
        tokenizer = base_tokenizer(folder)
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
    _check_conversations(folder, tokenizer)


def _check_conversations(folder: Path, tokenizer: Any) -> None:
    """Raise ConfigError where answers do not end, or where a text makes control tokens."""
    try:
        template = chat_template(tokenizer)
        turns = [Turn("What is it?", 1, "A sign."), Turn("And there?", 1, "a b</think>c")]
        template.write(turns, "Be kind.", [1, 1])
        ends = tokenizer(template.stop, add_special_tokens=False)["input_ids"]
    except ConfigError as error:
        raise base_error(folder, str(error)) from error
    except Exception as error:  # What a stranger's template raises is its own.
        reason = f"{type(error).__name__}: {error}"
        raise base_error(folder, f"its chat template cannot be followed ({reason})") from error
    if len(ends) != 1:
        raise base_error(
            folder,
            f"an answer ends with {template.stop!r}, which is no token: set eos_token in "
            "tokenizer_config.json",
        )
    # Of letters that a vocabulary lacks the token for unknown ones is made rightly.
    control = [token for token in control_tokens(tokenizer) if token != tokenizer.unk_token]
    hostile = [form(token) for token in control for form in (str, str.upper, _wide)]
    counts = [
        Counter(encode_prompt(tokenizer, [Turn(text)], [])) for text in ("a", " a ".join(hostile))
    ]
    for token in control:
        number = tokenizer.convert_tokens_to_ids(token)
        if counts[0][number] != counts[1][number]:
            raise base_error(
                folder,
                f"its tokenizer and template make the control token {token!r} of what people "
                "write: see the normalizer of tokenizer.json and chat_template.jinja",
            )


def _wide(text: str) -> str:
    """Return ASCII in full-width letters, of which NFKC makes ASCII again."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def check_shapes(folder: Path) -> None:
    """Raise ConfigError where stored weights are not those that config.json describes."""
    from transformers.activations import ACT2FN

    config = read_config(folder)
    chosen = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers
    for layer in chosen if isinstance(chosen, list | tuple) else [chosen]:
        if not isinstance(layer, int) or not -count <= layer <= count:
            raise base_error(
                folder,
                f"config.json's vision_feature_layer is {layer!r}: the tower has {count} layers, "
                f"of which -{count} to {count} are one",
            )
    acts = {
        "projector_hidden_act": config.projector_hidden_act,
        "vision_config.hidden_act": config.vision_config.hidden_act,
    }
    if odd := [f"{key} is {act!r}" for key, act in acts.items() if act not in ACT2FN]:
        raise base_error(folder, f"config.json's {odd[0]}, which transformers does not know")
    try:
        model = empty_model(config)
        found = _dry_tokens(model, folder)
    except Exception as error:  # transformers raises whatever a number leads to.
        raise _no_model(folder, error) from error
    if found[0] != found[1]:
        raise base_error(
            folder,
            f"a picture gives {found[0]} features and {found[1]} tokens: see image_size, "
            "patch_size, vision_feature_layer and vision_feature_select_strategy in config.json",
        )
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    names = weight_shapes(folder)
    stored = {module_name(name): shape for name, shape in names.items()}
    if is_tied(config):
        expected.pop("lm_head.weight", None)
    twice = [name for name, count in Counter(map(module_name, names)).items() if count > 1]
    missing = sorted(expected.keys() - stored.keys())
    other = [
        f"{name} is {list(stored[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    strange = [name for name in sorted(stored.keys() - expected.keys()) if _OF_A_LAYER.search(name)]
    problems = [f"{name} is there under two names" for name in sorted(twice)]
    problems += [f"{name} has no place in config.json's model" for name in strange]
    problems += [f"no {name}" for name in missing] + other
    rows = config.text_config.vocab_size
    ids = _ids(folder)
    if not problems and ids and max(ids.values()) >= rows:
        raise base_error(
            folder,
            f"its tokenizer has ids up to {max(ids.values())}, and the embedding {rows} rows: "
            "model.resize_token_embeddings(len(tokenizer)) adds them",
        )
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise base_error(
            folder,
            f"its weights are not those of config.json: {'; '.join(problems[:_SHOWN])}{more}",
        )


def _ids(folder: Path) -> dict[str, int]:
    """Return a tokenizer's ids; none where it cannot be read, which is said elsewhere."""
    from transformers import AutoTokenizer

    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
        return found
    except Exception:  # tokenizers raises a bare Exception.
        return {}


def read_config(folder: Path) -> Any:
    """Return transformers' config; raises ConfigError where it refuses."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise _no_model(folder, error) from error


def _no_model(folder: Path, error: Exception) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return base_error(folder, f"config.json describes no model that runs ({reason})")


def _dry_tokens(model: Any, folder: Path) -> tuple[int, int]:
    """Run a model without numbers; return a picture's features and the tokens it is given."""
    import torch

    family = family_of(folder)
    image = family.pixels(Image.new("RGB", (40, 30)))
    inputs = family.inputs([image])
    inputs["pixel_values"] = inputs["pixel_values"].to("meta")
    width = model.config.text_config.hidden_size
    with torch.no_grad():
        model = model.to("meta").eval()
        features = model.model.get_image_features(**inputs)
        features = getattr(features, "pooler_output", features)
        # With mask and positions, which are else made by looking at numbers.
        hidden = model.model.language_model(
            inputs_embeds=torch.zeros(1, 4, width, device="meta"),
            attention_mask=torch.zeros(1, 1, 4, 4, device="meta"),
            position_ids=torch.arange(4, device="meta")[None],
            use_cache=False,
        ).last_hidden_state
        model.lm_head(hidden)
    return sum(len(each.reshape(-1, each.shape[-1])) for each in features), image.num_tokens
