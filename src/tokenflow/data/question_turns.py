"""Single questions and their answers, in varied words: about captions, class names, and a set's own."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenflow.data import question_facts as facts
from tokenflow.data.question_rows import Rows, all_names
from tokenflow.data.question_words import APART, GROUPS

Turn = tuple[str, str]

# Of LLaVA-1.5; now and then part of a conversation, so that a model answers with it and without.
SHORT_ANSWER = "Answer the question using a single word or phrase."
DESCRIBE = (
    "Describe the picture.",
    "Describe the image in one sentence.",
    "What is happening in the picture?",
    "What does the picture show?",
    "Write a caption for this image.",
    "Give a short description of the photo.",
    "Describe this photo briefly.",
    "Please caption this picture.",
)
NAME = (
    "What is this?",
    "What is it?",
    "What is in the picture?",
    "What do you see in the image?",
    "Name the main thing in the picture.",
    "What is the main subject of this photo?",
)
_NAME_FLOWER = (*NAME, "What kind of flower is this?", "Which flower is it?", "Name this flower.")
_CHOICE = (
    "Which of these is in the picture: {options}?",
    "What is it: {options}?",
    "Which is it: {options}?",
    "What does the picture show: {options}?",
    "Choose what the image shows: {options}?",
)
_APART = (
    "Is it {one} or {other}?",
    "Is this {one} or {other}?",
    "What does the picture show, {one} or {other}?",
)
_COUNT = ("How many {x} are there?", "How many {x} are in the picture?", "How many {x} can you see?")
_WHICH_COLOR = ("What color is the {x}?", "Which color is the {x}?", "What is the color of the {x}?")

_CHOICES = 4


def yes_no_turns(known: Sequence[tuple[facts.Fact, bool]], rng: random.Random) -> list[Turn]:
    """Questions for facts of a picture."""
    return [(facts.ask_whether(fact, rng), "yes" if true else "no") for fact, true in known]


def open_turns(captions: Sequence[str], rng: random.Random) -> list[Turn]:
    """How many, and which colour."""
    turns = [
        (rng.choice(_COUNT).format(x=things), str(count))
        for things, count in facts.counts_in(captions).items()
        if count > 1 or rng.random() < 0.15  # one is by far the commonest
    ]
    turns += [
        (rng.choice(_WHICH_COLOR).format(x=noun), color) for noun, color in facts.colors_in(captions).items()
    ]
    rng.shuffle(turns)
    return turns


def caption_facts(
    rows: Rows, things: int, colors: int, rng: random.Random
) -> list[tuple[int, facts.Fact, bool]]:
    """Balanced facts about the pictures of a set with captions: so many of things, and of colours."""
    captions = [of_picture or () for of_picture in rows.columns["captions"]]
    return facts.balance(facts.sides_of([facts.things_in(c) for c in captions]), things, rng) + facts.balance(
        facts.sides_of([facts.color_facts(c) for c in captions]), colors, rng
    )


def class_facts(
    sets: Sequence[Rows], groups: int, classes: int, rng: random.Random
) -> list[tuple[int, facts.Fact, bool]]:
    """Balanced facts about the pictures of all sets, counted through: so many of groups, and of classes."""
    names, owners = all_names(sets)
    set_names = [sets[of_set].name for of_set, _ in owners]
    return facts.balance(facts.group_sides(names), groups, rng) + facts.balance(
        facts.class_sides(names, set_names), classes, rng
    )


def apart_turn(name: str, names: Sequence[str], rng: random.Random) -> tuple[str | None, list[Turn]]:
    """An animal or a vehicle? The wrong group is that of another picture.

    Returns:
        The true group and the turn; neither for a class in none of the groups.
    """
    true = next((group for group in APART if name in GROUPS[group][0]), None)
    for other in rng.sample(names, min(50, len(names))):
        wrong = next((group for group in APART if other in GROUPS[group][0]), None)
        if true and wrong and wrong != true and name not in GROUPS[wrong][1]:
            one, other_one = rng.sample([true, wrong], 2)
            return true, [(rng.choice(_APART).format(one=one, other=other_one), true)]
    return None, []


def name_turn(name: str, rows: Rows, rng: random.Random) -> Turn:
    """What is it? Or a choice between the names of four pictures of the same set."""
    if rng.random() < 0.35:
        return choice_turn(name, rows.columns["label_name"], rng)
    templates = _NAME_FLOWER if name in GROUPS["a flower"][0] else NAME
    return rng.choice(templates), facts.plain_name(name)


def choice_turn(name: str, names: Sequence[str], rng: random.Random) -> Turn:
    """Which of these? Wrong ones are the classes of other pictures, so that common classes are no hint."""
    options = [name]
    possible = len(set(names))
    while len(options) < min(_CHOICES, possible):
        other = rng.choice(names)
        if other not in options:
            options.append(other)
    rng.shuffle(options)
    spoken = [facts.plain_name(option) for option in options]
    listed = f"{', '.join(spoken[:-1])} or {spoken[-1]}"
    return rng.choice(_CHOICE).format(options=listed), facts.plain_name(name)


def own_turns(rows: Rows) -> list[list[Turn]]:
    """The questions of each picture, spelled as a person would: no "garbage_bin", no blank before "?"."""
    columns = rows.columns
    return [
        [
            (" ".join(question.split()).replace(" ?", "?").capitalize(), answer.replace("_", " "))
            for question, answer in zip(questions or (), answers or (), strict=True)
        ]
        for questions, answers in zip(columns["questions"], columns["answers"], strict=True)
    ]


def tidy(caption: str) -> str:
    """A caption as a sentence: a capital first, one full stop, no blanks around it or before punctuation."""
    text = re.sub(r" (?=[,;!?]|'s\b)", "", " ".join(caption.split())).rstrip(" .")
    return f"{text[:1].upper()}{text[1:]}."
