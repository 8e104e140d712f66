"""From turns and images to what an engine takes."""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from llava_ray.errors import DataError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.chat_template import Turn, chat_template
from llava_ray.models.conversation import encode_prompt
from llava_ray.models.family import Family


class Reads(Protocol):
    """What of an engine shapes a prompt; the web layer has it without having the engine."""

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""

    @property
    def family(self) -> Family:
        """How the model sees pictures."""


def make_prompt(
    engine: Reads,
    turns: str | Sequence[Turn],
    images: Sequence[Image.Image] = (),
    system: str = "",
) -> Prompt:
    """Encode a conversation, or one question about the images, in the order they are shown.

    Raises DataError when the turns have more or fewer images than are given.
    """
    if isinstance(turns, str):
        turns = [Turn(turns, num_images=len(images))]
    mentioned = sum(turn.num_images for turn in turns)
    if mentioned != len(images):
        raise DataError(f"the turns have {mentioned} images, but {len(images)} were given")
    pixels = tuple(map(engine.family.pixels, images))
    tokens = [image.num_tokens for image in pixels]
    ids = encode_prompt(engine.tokenizer, turns, tokens, system=system)
    return Prompt(input_ids=tuple(ids), images=pixels)


def check_prompt(engine: Engine, prompt: Prompt, length: int) -> None:
    """Raise DataError where an engine cannot take a prompt.

    length: tokens of the prompt and of what is to be scored behind it.
    """
    if not prompt.input_ids:
        raise DataError("empty prompt: at least one token is needed")
    if length > engine.context:
        raise DataError(
            f"prompt of {length} tokens: at most {engine.context} fit; shorten it or open the "
            "engine with a larger context"
        )
    vision = engine.family.vision
    found = prompt.input_ids.count(vision.image_token_id)
    expected = sum(image.num_tokens for image in prompt.images)
    if found != expected:
        raise DataError(
            f"{found} image tokens for {len(prompt.images)} images, which take {expected}"
        )
    wanted = (vision.image_size, vision.image_size, 3)
    for image in prompt.images:
        if image.tiles.shape[1:] != wanted:
            raise DataError(f"image of shape {image.tiles.shape[1:]}: {wanted} is needed")


def eos_token_id(tokenizer: Any, *configured: Any) -> int:
    """Return the token that ends an answer: by the chat template, the tokenizer or a config.

    configured: ints, lists of ints or None. Raises DataError where none is named.
    """
    stop = chat_template(tokenizer).stop
    number = tokenizer.convert_tokens_to_ids(stop)
    if number is not None and (number != tokenizer.unk_token_id or stop == tokenizer.unk_token):
        return int(number)
    for value in (tokenizer.eos_token_id, *configured):
        if isinstance(value, list):
            return int(value[0])
        if value is not None:
            return int(value)
    raise DataError("the model names no end-of-sequence token: add eos_token to its tokenizer")
