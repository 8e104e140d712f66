"""What is said about a generated scene.

`condensed` is the style of the fine-tuning data set, dense like GPT-4V's captions of TextOCR;
pretraining never sees it. `exchanges` are the questions and answers of pretraining.
"""

import random
from collections.abc import Callable

from llava_ray.embedded.scene import Scene, Sign, Thing

DESCRIBE = "Describe this image in detail."

Exchange = tuple[str, str]
"""Question and answer."""


def condensed(scene: Scene, rng: random.Random) -> str:
    """Write one to three sentences with every text, colour, place and thing."""
    first, *others = scene.signs
    opening = rng.choice(("The image features", "The image showcases", "The image displays"))
    start = f'{opening} {_a(first)} with the bold text "{first.text}" in {first.text_colour}'
    setting = f"{_where(first.place)}, set against {scene.background}."
    parts = [f"{start} {setting}"]
    for before, sign in zip(scene.signs, others, strict=False):
        parts.append(
            f'{_relation(before, sign)}, {_a(sign)} prominently reads "{sign.text}" '
            f"in {sign.text_colour}."
        )
    if scene.thing:
        parts.append(f"Additionally, {_a(scene.thing)} is visible {_where(scene.thing.place)}.")
    return " ".join(parts)


def plain(scene: Scene) -> str:
    """Write one short sentence per sign; the pretrained answer to the detailed question."""
    parts = [f"There is {_a(sign)} {_where(sign.place)} that says \"{sign.text}\"."
             for sign in scene.signs]  # fmt: skip
    if scene.thing:
        parts.append(f"There is {_a(scene.thing)} {_where(scene.thing.place)}.")
    parts.append(f"The background is {scene.background}.")
    return " ".join(parts)


def exchanges(scene: Scene, rng: random.Random) -> list[Exchange]:
    """Return questions and answers about a scene in random order; the description twice."""
    return [form(scene, rng) for form in rng.sample(_FORMS, len(_FORMS))]


def _describe(scene: Scene, rng: random.Random) -> Exchange:
    return DESCRIBE, plain(scene)


def _transcribe(scene: Scene, rng: random.Random) -> Exchange:
    question = rng.choice(("Read all the text.", "What does the text say?", "Transcribe the text."))
    return question, " ".join(f'"{sign.text}"' for sign in scene.signs)


def _brief(scene: Scene, rng: random.Random) -> Exchange:
    names = [_a(sign) for sign in scene.signs]
    if scene.thing:
        names.append(_a(scene.thing))
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    sentence = f"{listed[0].upper()}{listed[1:]} on {scene.background}."
    return "Describe this image briefly.", sentence


def _one_sign(scene: Scene, rng: random.Random) -> Exchange:
    sign = rng.choice(scene.signs)
    name = rng.choice((f"the {sign.kind}", f"the {sign.kind} {_where(sign.place)}"))
    return f"What does {name} say?", f'The {sign.kind} says "{sign.text}".'


def _letters(scene: Scene, rng: random.Random) -> Exchange:
    sign = rng.choice(scene.signs)
    return (
        f"What color is the text on the {sign.kind}?",
        f'"{sign.text}" is in {sign.text_colour} letters on {sign.colour}.',
    )


def _find(scene: Scene, rng: random.Random) -> Exchange:
    sign = rng.choice(scene.signs)
    return f'Where is the text "{sign.text}"?', f"On {_a(sign)} {_where(sign.place)}."


def _count(scene: Scene, rng: random.Random) -> Exchange:
    number = ("zero", "one", "two", "three", "four", "five")[len(scene.signs)]
    first = scene.signs[0].text
    return "How many texts are there?", f'There are {number}. The first is "{first}".'


def _story(scene: Scene, rng: random.Random) -> Exchange:
    parts = [
        f'{_article(sign.text_colour)} {sign.text_colour} text "{sign.text}" on {_a(sign)}'
        for sign in scene.signs
    ]
    return "What is shown?", f"In front of {scene.background}: {'; '.join(parts)}."


_FORMS: tuple[Callable[[Scene, random.Random], Exchange], ...] = (
    _describe, _describe, _transcribe, _brief, _one_sign, _letters, _find, _count, _story,
)  # fmt: skip


def _a(shown: Sign | Thing) -> str:
    return f"{_article(shown.colour)} {shown.colour} {shown.kind}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _where(place: str) -> str:
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def _relation(before: Sign, sign: Sign) -> str:
    """Say where a sign stands from the one before it."""
    from_x, from_y = _centre(before)
    x, y = _centre(sign)
    if abs(y - from_y) >= abs(x - from_x):
        return "Below it" if y > from_y else "Above it"
    return "To its right" if x > from_x else "To its left"


def _centre(sign: Sign) -> tuple[float, float]:
    return sum(x for x, _ in sign.corners) / 4, sum(y for _, y in sign.corners) / 4
