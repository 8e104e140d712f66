"""Conversations of a data set, and conversations as token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llava_ray.models.chat_template import IMAGE_TOKEN, Turn, chat_template, inside
from llava_ray.models.images import ImagePixels, read_pixels

if TYPE_CHECKING:
    from llava_ray.models.family import Family

IGNORE_INDEX = -100
"""Label of tokens that carry no loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True)
class Sample:
    """One conversation: what the model is trained on, calibrated with and measured by."""

    id: str
    images: tuple[str, ...]
    """The names of its pictures, in the order in which turns show them."""
    turns: tuple[Turn, ...]
    """All of them answered."""
    system: str | None = None
    """Default: the run's."""
    pictures: tuple[bytes, ...] = ()
    """The files of its pictures, once they are read."""

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The conversation up to the last answer."""
        last = self.turns[-1]
        return (*self.turns[:-1], Turn(last.text, last.num_images))

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1].answer or ""

    def as_llava(self) -> dict[str, Any]:
        """Return the row as LLaVA's trainer reads it."""
        said: list[dict[str, str | None]] = []
        if self.system is not None:
            said.append({"from": "system", "value": self.system})
        for turn in self.turns:
            shown = f"{IMAGE_TOKEN}\n" * turn.num_images
            said.append({"from": "human", "value": shown + turn.text})
            said.append({"from": "gpt", "value": turn.answer})
        row: dict[str, Any] = {"id": self.id}
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        return row | {"conversations": said}

    @classmethod
    def from_llava(cls, row: dict[str, Any]) -> "Sample":
        """Read a row that `as_llava` wrote."""
        image, said = row.get("image", ()), row["conversations"]
        system = said[0]["value"] if said[0]["from"] == "system" else None
        turns = []
        for human, gpt in zip(*[iter(said[system is not None :])] * 2, strict=True):
            text = human["value"]
            shown = f"{IMAGE_TOKEN}\n"
            count = 0
            while text.startswith(shown):
                text, count = text.removeprefix(shown), count + 1
            turns.append(Turn(text, count, gpt["value"]))
        images = (image,) if isinstance(image, str) else tuple(image)
        if len(images) != (mentioned := sum(turn.num_images for turn in turns)):
            raise ValueError(f"row {row['id']!r} names {len(images)} images, shows {mentioned}")
        return cls(str(row["id"]), images, tuple(turns), system)


def encode_prompt(
    tokenizer: Any, turns: Sequence[Turn], image_tokens: Sequence[int], *, system: str = ""
) -> list[int]:
    """Return the prompt's ids, each image being a run of as many image tokens as it takes."""
    template = chat_template(tokenizer)
    text = template.write(turns, system, image_tokens).text
    options = {} if template.adds_special_tokens else {"add_special_tokens": False}
    ids = list(tokenizer(text, **options)["input_ids"])
    # A prompt goes on; some tokenizers end every text.
    ended = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(template.stop)
    return ids[:-1] if ended else ids


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model is trained on it."""

    input_ids: list[int]
    labels: list[int]
    """The ids of answers and of the tokens that end them, IGNORE_INDEX elsewhere."""
    num_images: int
    """Of those that the conversation shows, cutting leaves the first so many."""


def encode_sample(
    tokenizer: Any,
    sample: Sample,
    image_tokens: Sequence[int],
    *,
    max_length: int,
    system: str = "",
) -> Encoded:
    """Return ids and labels of one sample.

    system: where the sample has none of its own. Too long samples are cut at the end, as LLaVA's
    trainer does; a cut inside of an image leaves none of it.
    """
    template = chat_template(tokenizer)
    system = system if sample.system is None else sample.system
    written = template.write(sample.turns, system, image_tokens)
    encoded = tokenizer(
        written.text,
        add_special_tokens=template.adds_special_tokens,
        return_offsets_mapping=True,
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    if len(ids) > 1 and tuple(offsets[-1]) == (0, 0):  # What some tokenizers put behind every text.
        ids, offsets = ids[:-1], offsets[:-1]
    ids = ids[:max_length]
    left = ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    whole = [total for total in accumulate(image_tokens) if total <= left]
    if rest := left - (whole[-1] if whole else 0):
        ids = ids[:-rest]
    learned = inside(offsets, written.answers)
    labels = [id if learn else IGNORE_INDEX for id, learn in zip(ids, learned, strict=False)]
    return Encoded(ids, labels, len(whole))


def encode_with_images(
    tokenizer: Any,
    sample: Sample,
    family: "Family",
    *,
    max_length: int,
    max_pixels: int,
    system: str = "",
) -> tuple[Encoded, list[ImagePixels]]:
    """Return a sample whose pictures were read, and those of its images that cutting leaves."""
    images = read_pixels(sample.pictures, family, max_pixels)
    tokens = [image.num_tokens for image in images]
    encoded = encode_sample(tokenizer, sample, tokens, max_length=max_length, system=system)
    return encoded, images[: encoded.num_images]
