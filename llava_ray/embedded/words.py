"""The words on generated signs; a tenth of them is never shown in pretraining.

Whether a word is held out depends on the word alone, so that lists may change.
"""

import hashlib
import random
import string
from collections.abc import Sequence
from typing import Literal

from llava_ray.errors import ConfigError

Split = Literal["train", "held_out"]

SHORTEST, LONGEST = 2, 11
HELD_OUT_SHARE = 0.1

SIGN_TEXT = (
    "open closed exit entrance stop sale bakery coffee tea bread fresh milk hotel taxi bus market "
    "pizza books flowers garden street road avenue parking private danger caution welcome push "
    "pull free new best hot cold ice cream fish meat bank post office museum school library "
    "station airport north south east west left right up down men women kids shoes hats bags wine "
    "beer bar grill salad soup fruit apple orange lemon honey sugar salt water gas fire police "
    "doctor pharmacy dentist salon barber spa gym pool park zoo farm house home room floor keep "
    "out off wet paint please wait here quiet smoking dogs bikes only one way slow school zone "
    "work ahead today special menu price pay cash card gift shop store"
)
"""Words that real signs bear, drawn more often than the dictionary's."""

UNFIT = (
    "anal anus arse cock coit cunt dago dyke fag fuck gook hooker jap jew kike nazi negr nigg "
    "orgasm penis piss porn pub puss rape rapi sex shit slut spic testic tit vag vulv whor"
)
"""Beginnings of words that nobody wants on a sign."""


def is_held_out(word: str) -> bool:
    """Tell whether pretraining never shows this word."""
    digest = hashlib.sha256(word.lower().encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE


def find_words() -> list[str]:
    """Return all lower-case words of the english-words package that fit on a sign, sorted.

    Raises ConfigError where the package is missing.
    """
    try:
        from english_words import get_english_words_set
    except ImportError as error:
        raise ConfigError(
            "scene text needs the package english-words: pip install 'llava_ray[scene-text]'"
        ) from error
    words = get_english_words_set(["gcide", "web2"], alpha=True, lower=True)
    letters = set(string.ascii_lowercase)
    unfit = tuple(UNFIT.split())
    return sorted(
        word
        for word in words
        if SHORTEST <= len(word) <= LONGEST
        and letters.issuperset(word)
        and not word.startswith(unfit)
    )


class WordList:
    """The words of one split, by length."""

    def __init__(self, words: Sequence[str], split: Split) -> None:
        """Keep the words of one split, and of the other what no random letters may spell."""
        wanted = split == "held_out"
        mine = [word for word in words if is_held_out(word) == wanted]
        self.by_length = [[w for w in mine if len(w) == length] for length in range(LONGEST + 1)]
        signs = sorted(set(SIGN_TEXT.split()))
        self.signs = [word for word in signs if is_held_out(word) == wanted]
        self.forbidden = set(words) - set(mine)

    def word(self, rng: random.Random, longest: int) -> str:
        """Draw a dictionary word of at most `longest` letters; longer ones are likelier."""
        if rng.random() < 0.15:
            word = rng.choice(self.signs)
            if len(word) <= longest:
                return word
        top = min(longest, LONGEST)
        length = max(rng.randint(SHORTEST, top), rng.randint(SHORTEST, top))
        return rng.choice(self.by_length[length] or self.by_length[top])

    def letters(self, rng: random.Random, longest: int) -> str:
        """Draw random letters that spell no word of the other split."""
        while True:
            length = rng.randint(SHORTEST, min(longest, 9))
            text = "".join(rng.choices(string.ascii_lowercase, k=length))
            if text not in self.forbidden:
                return text


def number(rng: random.Random, longest: int) -> str:
    """Draw a price, time, year, percentage or house number of at most `longest` characters."""
    forms = (
        lambda: str(rng.randint(1, 99)),
        lambda: str(rng.randint(100, 2099)),
        lambda: f"{rng.randint(1, 19)}.{rng.randint(0, 99):02d}",
        lambda: f"${rng.randint(1, 99)}",
        lambda: f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d}",
        lambda: f"{rng.randint(1, 9)}0%",
        lambda: f"{rng.choice(string.ascii_uppercase)}{rng.randint(1, 999)}",
        lambda: f"{rng.randint(10, 99)}-{rng.randint(100, 999)}",
    )
    text = rng.choice(forms)()
    return text if len(text) <= longest else str(rng.randint(1, 9))
