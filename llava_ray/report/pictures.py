"""Held-out images beside what each variant says about them."""

from dataclasses import dataclass

from llava_ray.benchmark.caption_scores import quoted_words, words
from llava_ray.models.dataset import open_split
from llava_ray.models.images import jpeg_url
from llava_ray.models.rgb import open_image
from llava_ray.report.findings import Findings, Origins

THUMBNAIL_PIXELS = 360


Parts = tuple[tuple[str, bool], ...]
"""An answer's text in order, and of each part whether it is a quoted word of the reference."""


@dataclass(frozen=True)
class Shown:
    """One image, its reference caption and all answers."""

    image: str
    data_uri: str
    reference: str
    answers: tuple[tuple[str, Parts], ...]
    """By slug."""


def show(findings: Findings, origins: Origins) -> list[Shown]:
    """Return the images that the baseline (or the winner) was shown, with all variants' answers."""
    lead = findings.baseline or findings.winner
    samples = open_split(origins.dataset, "test").first(len(lead.generations))
    limit = findings.config.data.max_image_pixels
    order = sorted(
        findings.scorecards,
        key=lambda card: (card is not lead, card is not findings.winner, card.variant_bytes),
    )
    shown = []
    for index, (sample, generation) in enumerate(zip(samples, lead.generations, strict=True)):
        answers = tuple(
            (card.slug, mark(card.generations[index].text, generation.reference))
            for card in order
            if index < len(card.generations)
        )
        uri = ""
        if sample.pictures:
            image = open_image(sample.pictures[-1], max_pixels=limit)
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            uri = jpeg_url(image, quality=82)
        shown.append(Shown(generation.image, uri, generation.reference, answers))
    return shown


def mark(text: str, reference: str) -> Parts:
    """Cut an answer into runs that are, and are not, quoted words of the reference."""
    wanted = set(quoted_words(reference))
    parts: list[tuple[str, bool]] = []
    for word in text.split():
        parts += [(" ", False), (word, bool(wanted.intersection(words(word))))]
    return tuple(parts[1:])
