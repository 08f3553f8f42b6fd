"""Answers and their scores: yes/no questions as POPE does, captions by CIDEr-D, all others as GQA does.

A question counts as a yes/no question if its expected answer is one of the two. Of the model's answer to
it the first word is read; anything but yes or no is wrong, and counted as unreadable. Other answers count if
they equal an expected one after lower-casing and without punctuation, articles and underscores; number words
are numbers, and a list is compared without regard to its order.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenflow.errors import UserError
from tokenflow.evaluation.captions import cider_d

CAPTIONS = "captions"  # the task whose expected answers are references
AVERAGE = "average"  # stands beside the tasks, so none can have this name
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """A question about picture number `picture`, the answers that count, and the one that was given.

    Attributes:
        task: what it belongs to, if the set says so; its answers to `"captions"` are references.
        source: the set its picture is from, if it says so.
    """

    picture: int
    question: str
    expected: tuple[str, ...]
    given: str = ""
    task: str = ""
    source: str = ""

    @property
    def is_yes_no(self) -> bool:
        return all(normalise(answer) in ("yes", "no") for answer in self.expected)

    @property
    def is_right(self) -> bool:
        """Whether the answer given is one that counts; of no meaning for captions."""
        if self.is_yes_no:
            return yes_or_no(self.given) == normalise(self.expected[0])
        return any(equal_answers(self.given, answer) for answer in self.expected)


def normalise(text: str) -> str:
    """Lower-case words without punctuation and articles; number words as digits."""
    words = re.sub(r"[^\w\s]", " ", text.lower().replace("_", " ").replace("'", "")).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def equal_answers(one: str, other: str) -> bool:
    """Whether two answers are equal once normalised; parts between commas may stand in any order."""
    parts = [{normalise(part) for part in text.split(",")} - {""} for text in (one, other)]
    return parts[0] == parts[1]


def yes_or_no(text: str) -> str | None:
    """The first word of an answer if it is yes or no, else None."""
    first = normalise(text).partition(" ")[0]
    return first if first in ("yes", "no") else None


def score(questions: Sequence[Question]) -> dict[str, Any]:
    """All figures of answered questions, shares from 0 to 1.

    Returns:
        Of questions with tasks, the figures of each task, and under "average" the mean of the tasks' main
        figures (see `main_figure`) where there are several. Of questions without: `accuracy` of all; where
        there are such, under "yes/no" the accuracy, precision, recall and F1 of yes, the shares of yes among
        the answers and of unreadable answers, and what always saying the commoner of the two would reach;
        under "open" the exact matches; and the number of questions of each kind.

    Raises:
        UserError: there is no question.
    """
    if not questions:
        raise UserError("the evaluation set is empty: no question could be asked; check data and split")
    tasks = list(dict.fromkeys(q.task for q in questions))
    if tasks == [""]:
        return _score_untold(questions)
    metrics: dict[str, Any] = {}
    for task in tasks:
        metrics[task or "other"] = _score_task([q for q in questions if q.task == task])
    if len(metrics) > 1:
        metrics[AVERAGE] = statistics.mean(main_figure(figures)[1] for figures in metrics.values())
    return metrics


def main_figure(figures: dict[str, Any]) -> tuple[str, float, float]:
    """Of a task: the name of the figure that stands for it, the figure, and its standard error.

    CIDEr-D of captions (1.0 counts as 100 %, though 10 is the most), else the share of right answers.
    """
    if "CIDEr-D" in figures:
        return "CIDEr-D", figures["CIDEr-D"], figures["standard error"]
    share = figures["accuracy"]
    return "accuracy", share, math.sqrt(share * (1 - share) / figures["questions"])


def each_figure(questions: Sequence[Question]) -> dict[str, list[float]]:
    """By task, what each question adds to the task's main figure: its CIDEr-D, or 1 for a right answer."""
    found: dict[str, list[float]] = {}
    for task in dict.fromkeys(q.task for q in questions):
        asked = [q for q in questions if q.task == task]
        if task == CAPTIONS:
            found[task] = cider_d([q.given for q in asked], [q.expected for q in asked])
        else:
            found[task or "other"] = [float(q.is_right) for q in asked]
    return found


def _score_task(questions: Sequence[Question]) -> dict[str, Any]:
    if questions[0].task == CAPTIONS:
        each = cider_d([q.given for q in questions], [q.expected for q in questions])
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
        return {"CIDEr-D": statistics.mean(each), "standard error": error, "questions": len(each)}
    found = _score_untold(questions)
    figures: dict[str, Any] = {"accuracy": found["accuracy"]}
    if all(q.is_yes_no for q in questions):
        figures = found["yes/no"]
    sources = dict.fromkeys(q.source for q in questions)
    if len(sources) > 1:
        for source in sources:
            of_source = [q.is_right for q in questions if q.source == source]
            figures[f"accuracy, {source}"] = sum(of_source) / len(of_source)
    return {**figures, "questions": len(questions)}


def _score_untold(questions: Sequence[Question]) -> dict[str, Any]:
    closed = [q for q in questions if q.is_yes_no]
    others = [q for q in questions if not q.is_yes_no]
    metrics: dict[str, Any] = {}
    if closed:
        pairs = [(normalise(q.expected[0]), yes_or_no(q.given)) for q in closed]
        hits = pairs.count(("yes", "yes"))
        said_yes = sum(said == "yes" for _, said in pairs)
        wanted_yes = sum(wanted == "yes" for wanted, _ in pairs)
        metrics["yes/no"] = {
            "accuracy": sum(q.is_right for q in closed) / len(pairs),
            "precision": hits / said_yes if said_yes else 0.0,
            "recall": hits / wanted_yes if wanted_yes else 0.0,
            "F1": 2 * hits / (said_yes + wanted_yes) if said_yes + wanted_yes else 0.0,
            "yes share": said_yes / len(pairs),
            "unreadable": sum(said is None for _, said in pairs) / len(pairs),
            "commoner answer": max(wanted_yes, len(pairs) - wanted_yes) / len(pairs),
            "questions": len(pairs),
        }
    if others:
        metrics["open"] = {
            "exact match": sum(q.is_right for q in others) / len(others),
            "questions": len(others),
        }
    return {"accuracy": sum(q.is_right for q in questions) / len(questions), **metrics}
