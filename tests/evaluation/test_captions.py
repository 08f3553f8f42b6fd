"""CIDEr-D by hand, at its ends, and against figures of the field's implementation."""

from __future__ import annotations

import math

import pytest

from tokenflow.evaluation.captions import MAXIMUM, cider_d, words_of


def test_words_are_plain_and_lower_case():
    assert words_of("A man's T-shirt, and 2 dogs .") == ["a", "mans", "t", "shirt", "and", "2", "dogs"]


def test_a_case_by_hand():
    # Two pictures; "dog" is in the references of one, "a" in those of both: rarity log 2 and 0. Of the two
    # bigrams of "a dog runs", "a dog" is known and "dog runs" in no reference: rarity log 2 each.
    scores = cider_d(["a dog runs", "cat"], [["a dog"], ["a cat sits"]])
    one = 1 / math.sqrt(2)  # cosine of (dog, runs) with (dog)
    two = 1 / math.sqrt(2)  # of (a dog, dog runs) with (a dog)
    penalty = math.exp(-1 / 72)
    assert scores[0] == pytest.approx(10 * penalty * (one + two) / 4)
    penalty = math.exp(-4 / 72)
    assert scores[1] == pytest.approx(10 * penalty * (1 / math.sqrt(2)) / 4)


def test_the_most_and_the_least():
    captions = ["two dogs run on the grass", "a man rides a red bike"]
    assert cider_d(captions, [[caption] * 2 for caption in captions]) == pytest.approx([MAXIMUM, MAXIMUM])
    assert cider_d(captions, [captions[1:], captions[:1]]) == [0, 0]
    assert cider_d(["", ""], [captions[:1], captions[1:]]) == [0, 0]
    assert cider_d(captions[:1], [captions[:1]]) == [0]  # nothing is rare in one picture
    assert cider_d(["two dogs", captions[1]], [["two dogs"], captions[1:]])[0] == pytest.approx(
        5
    )  # no 3-grams


def test_repeating_gains_nothing_and_length_counts():
    references = [["a dog runs on the grass"], ["two men on a bench"]]
    plain, again = (cider_d([text, "x"], references)[0] for text in ("a dog runs", "a dog dog dog runs"))
    assert again < plain
    other = cider_d(["A DOG runs on the grass!", "x"], references)[0]
    assert other == pytest.approx(10)


def test_figures_of_the_released_scorer():
    # pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0), on the same words.
    references = [
        ["a brown dog runs through the grass", "the dog is running in a field"],
        ["two children play on the beach", "kids dig in the sand by the sea", "children on a beach"],
        ["a man on a red bike"],
    ]
    captions = [
        "a dog is running through a field",
        "two kids play in the sand",
        "a man rides a bike on a road",
    ]
    assert cider_d(captions, references) == pytest.approx([2.450127335, 1.229470727, 1.936021608])


def test_lists_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 captions need"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="non-empty"):
        cider_d(["a"], [[]])
