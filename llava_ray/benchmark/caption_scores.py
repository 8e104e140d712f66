"""How good generated captions are: ROUGE-L, CIDEr-D and the words that were read.

CIDEr-D is written out here because its package brings 100 MB of Java for a tokenizer.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

# Single quotes count only around a phrase, so that an apostrophe opens nothing.
_QUOTED = re.compile(r"\"([^\"]*)\"|“([^”]+)”|(?<!\w)'([^']+(?:'\w[^']*)*)'(?!\w)|‘([^’]+)’(?!\w)")

Grams = Counter[tuple[str, ...]]
"""Runs of one number of words, each with its count."""


def caption_scores(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Return the means over all pairs; the two of quoted words only where there are such words."""
    assert len(references) == len(texts) > 0
    scores = {"rouge_l": rouge_l(references, texts), "cider_d": cider_d(references, texts)}
    if any(quoted_words(reference) for reference in references):
        scores["word_recall"] = word_recall(references, texts)
        scores["character_error_rate"] = character_error_rate(references, texts)
    return scores


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure of the rouge-score package, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # The default one, but named: else the package logs that it takes it.
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))
    pairs = zip(references, texts, strict=True)
    return fmean(scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs)


def quoted_words(text: str) -> list[str]:
    """Return the words inside quotation marks, without case and outer punctuation."""
    phrases = ("".join(groups) for groups in _QUOTED.findall(text))
    return [word for phrase in phrases for word in words(phrase)]


def words(text: str) -> list[str]:
    """Split at white space; drop case and the punctuation around each word."""
    bare = (re.sub(r"^\W+|\W+$", "", word.casefold()) for word in text.split())
    return [word for word in bare if word]


def word_recall(references: Sequence[str], texts: Sequence[str]) -> float:
    """Return the share of the references' quoted words that the texts hold, each as often."""
    found = total = 0
    for reference, text in zip(references, texts, strict=True):
        wanted, said = Counter(quoted_words(reference)), Counter(words(text))
        found += (wanted & said).total()
        total += wanted.total()
    return found / total


def character_error_rate(references: Sequence[str], texts: Sequence[str]) -> float:
    """Return edits per character from the texts' nearest words to the quoted words; at most 1."""
    edits = total = 0
    for reference, text in zip(references, texts, strict=True):
        said = set(words(text))
        for wanted in quoted_words(reference):
            edits += min([len(wanted), *(edit_distance(wanted, word) for word in said)])
            total += len(wanted)
    return edits / total


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def cider_d(references: Sequence[str], texts: Sequence[str]) -> float:
    """Return the mean CIDEr-D (0 to 10) with one reference each and their own document counts.

    Source: Vedantam et al. 2015, as in coco-caption's cider_scorer.py, whose length penalty
    counts bigrams. Words are the runs of letters and digits, in lower case.
    """
    said, wanted = [_grams(text) for text in texts], [_grams(text) for text in references]
    documents: Grams = Counter()
    for each in wanted:
        for grams in each:
            documents.update(grams.keys())
    log_count = math.log(len(references))
    weight = {gram: log_count - math.log(count) for gram, count in documents.items()}

    def vector(grams: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * weight.get(gram, log_count) for gram, count in grams.items()}

    def similarity(text: list[Grams], reference: list[Grams]) -> float:
        longer = text[1].total() - reference[1].total()
        penalty = math.exp(-(longer**2) / (2 * 6.0**2))
        pairs = zip(text, reference, strict=True)
        return 10 * penalty * sum(_clipped_cosine(vector(a), vector(b)) for a, b in pairs) / 4

    return fmean(similarity(text, reference) for text, reference in zip(said, wanted, strict=True))


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    lengths = math.hypot(*a.values()) * math.hypot(*b.values())
    product = sum(min(value, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, value in a.items())
    return product / lengths if lengths else 0.0


def _grams(text: str) -> list[Grams]:
    """Return the runs of one word, of two, three and four."""
    tokens = re.findall(r"\w+", text.lower())
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]
