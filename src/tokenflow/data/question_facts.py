"""What captions and class names say about a picture, and fair yes/no questions out of it.

A fact is true, false or unknown of a picture. Captions do not name everything that is to be seen, so "no" is
said only of salient things that none of a picture's captions mentions or hints at. `balance` asks every
fact equally often where it is true and where it is false (POPE, Li et al. 2023, draws absent things by their
frequency for the same reason): the words of a question alone then tell nothing about the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenflow.data.question_words import (
    COLORED,
    COLORS,
    COUNTED,
    GROUPS,
    MASS_NAMES,
    NUMBERS,
    PLAIN_NAMES,
    PLURAL_NAMES,
    THINGS,
)

# ("thing", phrase), ("color", noun, color), ("group", phrase) or ("class", name)
Fact = tuple[str, ...]
Sides = Iterable[tuple[Fact, list[int], list[int]]]  # a fact, where it is true, and where it is false

_WITHOUT_ARTICLE = "*"
_NOT_WORDS = re.compile(r"[^a-z ]+")
_COLOR = "|".join(COLORS)
_FORMS = {thing.phrase: thing.forms for thing in THINGS}


# --------------------------------------------------------------------------------------- what captions say
def words_of(caption: str) -> list[str]:
    """Lower-case words; "t-shirt" is one, and a mountain bike is a bike."""
    text = caption.lower().replace("t-shirt", "tshirt").replace("mountain bik", "bik")
    return _NOT_WORDS.sub(" ", text.replace("'s", "")).split()


def things_in(captions: Sequence[str]) -> dict[Fact, bool]:
    """Which of `THINGS` the captions of one picture name, and which are surely not its subject."""
    said = {word for caption in captions for word in words_of(caption)}
    found: dict[Fact, bool] = {}
    for thing in THINGS:
        if said & thing.forms:
            found["thing", thing.phrase] = True
        elif not said & thing.unclear:
            found["thing", thing.phrase] = False
    return found


def colors_in(captions: Sequence[str]) -> dict[str, str]:
    """The colour of each thing of `COLORED` to which the captions of a picture together give only one."""
    found: dict[str, set[str]] = {}
    for caption in captions:
        text = " ".join(words_of(caption))
        for noun, forms in COLORED.items():
            # "a red and white striped shirt": colours, at most one more word, the thing.
            pattern = (
                rf"\b({_COLOR})(?: and ({_COLOR}))?(?: (?!and |{_COLOR})\w+)? (?:{'|'.join(sorted(forms))})\b"
            )
            for match in re.finditer(pattern, text):
                found.setdefault(noun, set()).update(COLORS[color] for color in match.groups() if color)
    return {noun: next(iter(colors)) for noun, colors in found.items() if len(colors) == 1}


def color_facts(captions: Sequence[str]) -> dict[Fact, bool]:
    """Of everything that has one colour, which it is and which not."""
    return {
        ("color", noun, color): color == actual
        for noun, actual in colors_in(captions).items()
        for color in sorted(set(COLORS.values()))
    }


def counts_in(captions: Sequence[str]) -> dict[str, int]:
    """How many of `COUNTED` there are, where at least two captions give a number and all give the same."""
    found: dict[str, list[int]] = {}
    for caption in captions:
        text = " ".join(words_of(caption))
        for asked, (one, many) in COUNTED.items():
            numbers = [
                NUMBERS[word] for word in re.findall(rf"\b({'|'.join(NUMBERS)})(?: \w+)? {many}\b", text)
            ]
            if not numbers and re.search(rf"\b(?:a|an|the|one|his|her)(?: \w+)? {one}\b", text):
                numbers = [1] if len(re.findall(rf"\b{one}\b", text)) == 1 else [0]
            elif not numbers and re.search(rf"\b{many}\b", text):
                numbers = [0]  # several, but who knows how many
            found.setdefault(asked, []).extend(numbers)
    return {
        asked: numbers[0]
        for asked, numbers in found.items()
        if len(numbers) > 1 and len(set(numbers)) == 1 and numbers[0]
    }


# ----------------------------------------------------------------------------------------- facts to balance
def sides_of(facts: Sequence[dict[Fact, bool]]) -> Iterator[tuple[Fact, list[int], list[int]]]:
    """Facts of pictures 0, 1, ... turned round: each fact, where it is true and where it is false."""
    for fact in dict.fromkeys(fact for of_picture in facts for fact in of_picture):
        known = [(i, of_picture[fact]) for i, of_picture in enumerate(facts) if fact in of_picture]
        yield fact, [i for i, true in known if true], [i for i, true in known if not true]


def group_sides(names: Sequence[str]) -> Iterator[tuple[Fact, list[int], list[int]]]:
    """`GROUPS` of the classes of pictures 0, 1, ...; a class that no group knows is in none of them."""
    for phrase, (members, unclear) in GROUPS.items():
        inside = [i for i, name in enumerate(names) if name in members]
        outside = [i for i, name in enumerate(names) if name not in members and name not in unclear]
        yield ("group", phrase), inside, outside


def class_sides(names: Sequence[str], sets: Sequence[str]) -> Iterator[tuple[Fact, list[int], list[int]]]:
    """The classes themselves; a class is denied only of pictures of the same set."""
    where = dict(zip(names, sets, strict=True))
    for name, of_set in where.items():
        inside = [i for i, other in enumerate(names) if other == name]
        outside = [i for i, other in enumerate(names) if other != name and sets[i] == of_set]
        yield ("class", name), inside, outside


def balance(sides: Sides, budget: int, rng: random.Random) -> list[tuple[int, Fact, bool]]:
    """About `budget` questions at most, each fact as often true as false.

    Args:
        sides: see `Sides`.
        budget: divided evenly; rare facts use less of it, and with less than two questions a fact only some
            facts are asked at all.
        rng: draws the pictures; evenly, for how much a picture was asked before must be no hint either.

    Returns:
        (picture, fact, whether it is true), fact by fact.
    """
    usable = [(fact, yes, no) for fact, yes, no in sides if yes and no]
    pairs = budget // 2
    if len(usable) > pairs:
        usable = rng.sample(usable, pairs)
    asked: list[tuple[int, Fact, bool]] = []
    for fact, yes, no in usable:
        count = min(len(yes), len(no), pairs // len(usable))
        for side, true in ((yes, True), (no, False)):
            asked += [(picture, fact, true) for picture in rng.sample(side, count)]
    return asked


def broad_first(known: Sequence[tuple[Fact, bool]]) -> list[tuple[Fact, bool]]:
    """Facts of a picture, broad ones first, since a narrow one gives the broad one away."""
    kinds = ("group", "thing", "color", "class")
    return sorted(known, key=lambda pair: (kinds.index(pair[0][0]), -len(_extent(pair[0]))))


def split_settled(
    known: Sequence[tuple[Fact, bool]], given: Sequence[tuple[Fact, bool]] = ()
) -> list[list[tuple[Fact, bool]]]:
    """Facts of a picture in as few parts as it takes that none follows from those before it in its part.

    In a conversation, "an animal? no; a dog? no" would teach to read instead of to look. `given` is what the
    first part begins with; it is not returned.
    """
    parts: list[list[tuple[Fact, bool]]] = [list(given)]
    for fact, true in broad_first(known):
        fitting = next(
            (part for part in parts if not any(_settles(*earlier, fact) for earlier in part)), None
        )
        if fitting is None:
            parts.append([(fact, true)])
        else:
            fitting.append((fact, true))
    return [parts[0][len(given) :], *parts[1:]]


def _settles(earlier: Fact, true: bool, fact: Fact) -> bool:
    """Whether an earlier answer settles a fact: dogs are animals, and what is a dog is no vehicle."""
    before, now = _extent(earlier), _extent(fact)
    if not true:
        return now <= before
    exclusive = earlier[0] != "thing" and (earlier[0] != "color" or earlier[:2] == fact[:2])
    return before <= now or (exclusive and not before & now)


def _extent(fact: Fact) -> frozenset[str]:
    """The words, classes or colours of which a fact is true."""
    if fact[0] == "thing":
        return _FORMS[fact[1]]
    return GROUPS[fact[1]][0] if fact[0] == "group" else frozenset([" ".join(fact[1:])])


# ------------------------------------------------------------------------------------------------- wording
_OF_THINGS = (
    "{be} there {x} in the picture?",
    "{be} there {x} in the image?",
    "{be} there {x} here?",
    "Can you see {x} in the picture?",
    "Do you see {x}?",
    "Does the picture show {x}?",
    "Does this photo show {x}?",
)
_OF_WHAT_IT_IS = ("Is this {x}?", "Is it {x}?", "Does the picture show {x}?", "Is {x} shown in the image?")
_OF_COLORS = (
    "Is the {noun} {color}?",
    "Does the picture show a {color} {noun}?",
    "Is there a {color} {noun}?",
)


def plain_name(name: str) -> str:
    """A class as one says it."""
    return PLAIN_NAMES.get(name, name)


def with_article(name: str) -> str:
    """ "an ox", "a pizza", "sunglasses"."""
    if name in PLURAL_NAMES or name in MASS_NAMES:
        return name
    return f"{'an' if name[0].lower() in 'aeio' or name.startswith('um') else 'a'} {name}"


def ask_whether(fact: Fact, rng: random.Random) -> str:
    """A yes/no question for a fact; its wording does not depend on the answer."""
    if fact[0] == "color":
        noun, color = fact[1:]
        question = rng.choice(_OF_COLORS).format(noun=noun, color=color)
        return question.replace("a orange", "an orange")
    if fact[0] == "thing":
        phrase = fact[1].removeprefix(_WITHOUT_ARTICLE)
        be = "Are" if fact[1].startswith(_WITHOUT_ARTICLE) else "Is"
        return rng.choice(_OF_THINGS).format(x=phrase, be=be)
    name = plain_name(fact[1])
    phrase = name if fact[0] == "group" else with_article(name)
    plural = name in PLURAL_NAMES
    templates = (*_OF_WHAT_IT_IS, *_OF_THINGS) if fact[0] == "class" else _OF_WHAT_IT_IS
    question = rng.choice(templates).format(x=phrase, be="Are" if plural else "Is")
    if plural:
        question = (
            question.replace("Is this", "Are these").replace("Is it", "Are these").replace("Is ", "Are ")
        )
    return question
