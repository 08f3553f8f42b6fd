"""CIDEr-D: how much a caption says what people say (Vedantam et al., CVPR 2015)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on length
MAXIMUM = 10.0

NGrams = Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    """Plain lower-case words: punctuation goes, and what a hyphen joins are two words."""
    return re.sub(r"[^\w\s]", " ", caption.lower().replace("'", "")).split()


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption against its references, from 0 to 10; a set's figure is the mean.

    n-grams of 1 to 4 words count by their number times their rarity among the references of all pictures
    (no stemming, and, as in the released code, numbers are not divided by the length first); what a caption
    repeats more often than a reference does not count, and a Gaussian (sigma 6) of the difference in length
    does. 10 means: at least four words, and word for word every reference. Rarity is that of this set, so
    figures of different sets, or of few pictures, do not compare; with one picture all are 0.

    Raises:
        ValueError: not as many lists of references as captions, or a caption without references.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions need as many non-empty lists of references")
    known = [[_ngrams(words_of(reference)) for reference in of_picture] for of_picture in references]
    pictures_with: Counter[tuple[str, ...]] = Counter()
    for of_picture in known:
        pictures_with.update({ngram for counts in of_picture for by_length in counts for ngram in by_length})
    rarity = {ngram: math.log(len(known) / count) for ngram, count in pictures_with.items()}
    unseen = math.log(len(known)) if known else 0.0  # an n-gram that no reference has
    scores = []
    for caption, of_picture in zip(captions, known, strict=True):
        said = _ngrams(words_of(caption))
        similar = [_similarity(said, reference, rarity, unseen) for reference in of_picture]
        scores.append(MAXIMUM * sum(similar) / len(similar))
    return scores


def _ngrams(words: Sequence[str]) -> list[NGrams]:
    """Numbers of the n-grams of 1, 2, 3 and 4 words."""
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
        for n in range(1, LONGEST + 1)
    ]


def _similarity(
    said: Sequence[NGrams], reference: Sequence[NGrams], rarity: dict[tuple[str, ...], float], unseen: float
) -> float:
    """The mean over n of the clipped cosine between weighted n-grams, times the penalty on length."""
    cosines = []
    for ours, theirs in zip(said, reference, strict=True):
        weighted = {ngram: count * rarity.get(ngram, unseen) for ngram, count in ours.items()}
        target = {ngram: count * rarity[ngram] for ngram, count in theirs.items()}
        norms = math.hypot(*weighted.values()) * math.hypot(*target.values())
        common = sum(
            min(weight, target.get(ngram, 0.0)) * target.get(ngram, 0.0) for ngram, weight in weighted.items()
        )
        cosines.append(common / norms if norms else 0.0)
    longer = said[0].total() - reference[0].total()
    return math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / len(cosines)
