"""Conversations to train on and questions to measure with, out of sets with captions, labels or questions.

What a set holds decides what is asked: a column `captions` gives descriptions, things, colours and numbers;
`label_name` gives names, groups and choices; `questions` and `answers` are taken as they are. The same seed
gives the same files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenflow.data import question_facts as facts
from tokenflow.data.question_rows import Rows, all_names, read_rows, write_rows
from tokenflow.data.question_turns import (
    DESCRIBE,
    NAME,
    SHORT_ANSWER,
    Turn,
    apart_turn,
    caption_facts,
    choice_turn,
    class_facts,
    name_turn,
    open_turns,
    own_turns,
    tidy,
    yes_no_turns,
)
from tokenflow.errors import UserError

# A fact of a picture, and whether it is true.
Known = tuple[facts.Fact, bool]

# Yes/no questions a picture, on average at most.
_THINGS_EACH, _COLORS_EACH, _GROUPS_EACH, _CLASSES_EACH = 4, 1, 3, 1
_TURNS = 6


# ------------------------------------------------------------------------------- conversations to train on
def caption_conversations(rows: Rows, rng: random.Random) -> Iterator[tuple[int, list[Turn]]]:
    """Two conversations a picture with captions: a description; and questions, with a description behind."""
    captions = [[tidy(caption) for caption in of_picture or ()] for of_picture in rows.columns["captions"]]
    asked = caption_facts(rows, _THINGS_EACH * len(rows), _COLORS_EACH * len(rows), rng)
    of_picture = by_picture(asked, len(rows))
    for i, known in enumerate(captions):
        if not known:
            continue
        described = [(rng.choice(DESCRIBE), caption) for caption in rng.sample(known, min(2, len(known)))]
        yield i, described[:1]
        parts = [yes_no_turns(part, rng) for part in facts.split_settled(of_picture[i])]
        # Open questions come at the end: they would give the closed ones away.
        parts[0] += open_turns(known, rng)[:2]
        for part in parts:
            for turns in chunks(part, _TURNS):
                yield i, [*turns, *described[1:]] if rng.random() < 0.5 else turns


def class_conversations(sets: Sequence[Rows], rng: random.Random) -> Iterator[tuple[int, int, list[Turn]]]:
    """(Set, picture, turns) of all sets with class names together, so that one tells another's groups apart.

    From broad to narrow: one group or another, groups, is it this class; then its name or a choice of names,
    which half of the time stands alone, and always where a question before gives it away.
    """
    names, owners = all_names(sets)
    of_picture = by_picture(
        class_facts(sets, len(names) * _GROUPS_EACH, len(names) * _CLASSES_EACH, rng), len(names)
    )
    for i, (name, (of_set, number)) in enumerate(zip(names, owners, strict=True)):
        group, first = apart_turn(name, names, rng) if rng.random() < 0.4 else (None, [])
        given = [(("group", group), True)] if group else []
        parts = [yes_no_turns(part, rng) for part in facts.split_settled(of_picture[i], given)]
        parts[0] = [*first, *parts[0]]
        fine = name_turn(name, sets[of_set], rng)
        given_away = any(fact[0] == "class" and true for fact, true in of_picture[i])
        if given_away or rng.random() < 0.5:
            parts.append([fine])
        else:
            parts[0].append(fine)
        for part in parts:
            for turns in chunks(part, _TURNS):
                yield of_set, number, turns


def question_conversations(rows: Rows, rng: random.Random) -> Iterator[tuple[int, list[Turn]]]:
    """The questions of a set as they are, a few in each conversation."""
    for i, turns in enumerate(own_turns(rows)):
        rng.shuffle(turns)
        for part in chunks(turns, _TURNS):
            yield i, part


def conversations(sets: Sequence[Rows], seed: int) -> dict[str, list[dict[str, Any]]]:
    """All conversations of each set, in an order that mixes them.

    Returns:
        By name of the set: rows with `image`, `conversations` (a list of {"from": "human" or "gpt", "value"},
        `<image>` and a newline before the first question), `source` (the set's name) and `id`.

    Raises:
        UserError: a set has neither captions nor class names nor questions.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number, rows in enumerate(sets):
        rng = random.Random(f"{seed} {number} {rows.name}")
        talks = [*question_conversations(rows, rng)] if rows.has("questions") else []
        if _captioned([rows]):
            talks += caption_conversations(rows, rng)
        if not talks and not _labelled([rows]):
            raise UserError(f"{rows.name} has nothing to ask about: no captions, label_name or questions")
        found[rows.name] = [_conversation(rows, i, turns, rng) for i, turns in talks]
    labelled = _labelled(sets)
    rng = random.Random(f"{seed} classes")
    for of_set, i, turns in class_conversations(labelled, rng) if labelled else ():
        found[labelled[of_set].name].append(_conversation(labelled[of_set], i, turns, rng))
    for name, talks_of in found.items():
        random.Random(f"{seed} order {name}").shuffle(talks_of)
        for number, row in enumerate(talks_of):
            row["id"] = f"{row['id']}-{number}"
    return found


def descriptions(sets: Sequence[Rows], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Each picture once, with its class name or one of its captions: what stage align learns from.

    Returns:
        As `conversations`, of one question and answer each; nothing for a set without names and captions.
    """
    found = {}
    for rows in _labelled(sets) + _captioned(sets):
        rng = random.Random(f"{seed} align {rows.name}")
        if rows.has("label_name"):
            told = [(rng.choice(NAME), facts.plain_name(name)) for name in rows.columns["label_name"]]
        else:
            known = [rng.choice(captions or [""]) for captions in rows.columns["captions"]]
            told = [(rng.choice(DESCRIBE), tidy(caption) if caption.strip() else "") for caption in known]
        talks = [_conversation(rows, i, [turn], rng) for i, turn in enumerate(told) if turn[1]]
        rng.shuffle(talks)
        if talks:
            found[rows.name] = talks
    return found


def _conversation(rows: Rows, i: int, turns: Sequence[Turn], rng: random.Random) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        short = question not in DESCRIBE
        hint = f"\n{SHORT_ANSWER}" if number == 0 and short and rng.random() < 0.2 else ""
        said.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question + hint})
        said.append({"from": "gpt", "value": answer})
    return {"image": rows.images[i], "conversations": said, "source": rows.name, "id": f"{rows.name}-{i}"}


# ---------------------------------------------------------------------------------- questions to measure with
def tasks(sets: Sequence[Rows], limit: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Questions by task, about `limit` each.

    Returns:
        By task, as far as the sets allow: rows with `image`, `questions`, `answers` (for each question a list
        of those that count; for captions, all references), `task`, `source` and `id`.
    """
    found = {
        "yes-no": list(yes_no_task(sets, limit, random.Random(f"{seed} yes-no"))),
        "what-is-it": list(name_task(sets, limit, random.Random(f"{seed} names"))),
        "which-of-these": list(choice_task(sets, limit, random.Random(f"{seed} choices"))),
        "captions": list(caption_task(sets, limit // 2, random.Random(f"{seed} captions"))),
        "qa": list(own_task(sets, limit, random.Random(f"{seed} qa"))),
    }
    for task, rows_of in found.items():
        random.Random(f"{seed} order {task}").shuffle(rows_of)
    return {task: rows_of for task, rows_of in found.items() if rows_of}


def yes_no_task(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Balanced facts: half about captions (things, colours), half about classes (groups, names)."""
    labelled, captioned = _labelled(sets), _captioned(sets)
    share = limit // (bool(labelled) + bool(captioned) or 1)
    for rows in captioned:
        part = share // len(captioned)
        asked = caption_facts(rows, part * 3 // 4, part // 4, rng)
        yield from _yes_no_rows(rows, by_picture(asked, len(rows)), rng)
    if labelled:
        of_picture = by_picture(class_facts(labelled, share // 2, share // 2, rng), sum(map(len, labelled)))
        for rows in labelled:
            yield from _yes_no_rows(rows, of_picture[: len(rows)], rng)
            of_picture = of_picture[len(rows) :]


def _yes_no_rows(
    rows: Rows, of_picture: Sequence[list[Known]], rng: random.Random
) -> Iterator[dict[str, Any]]:
    for i, known in enumerate(of_picture):
        if known:
            turns = [(question, [answer]) for question, answer in yes_no_turns(known, rng)]
            yield _question_row(rows, i, "yes-no", turns)


def name_task(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """What is this? The class by any of its names."""
    for rows, i in _sample(_labelled(sets), limit, rng):
        name = rows.columns["label_name"][i]
        counted = [facts.plain_name(name), name, *rows.synonyms.get(name, ())]
        yield _question_row(rows, i, "what-is-it", [(NAME[0], list(dict.fromkeys(counted)))])


def choice_task(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The same with four names to choose from."""
    for rows, i in _sample(_labelled(sets), limit, rng):
        names = rows.columns["label_name"]
        question, answer = choice_turn(names[i], names, rng)
        yield _question_row(rows, i, "which-of-these", [(question, [answer])])


def caption_task(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """A description, with all captions as references."""
    for rows, i in _sample(_captioned(sets), limit, rng):
        references = [tidy(caption) for caption in rows.columns["captions"][i] or ()]
        if references:
            yield _question_row(rows, i, "captions", [(DESCRIBE[0], references)])


def own_task(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The questions of sets that have their own."""
    asking = [rows for rows in sets if rows.has("questions")]
    for rows in asking:
        flat = [(i, turn) for i, turns in enumerate(own_turns(rows)) for turn in turns]
        chosen: dict[int, list[tuple[str, list[str]]]] = {}
        for i, (question, answer) in sorted(rng.sample(flat, min(limit // len(asking), len(flat)))):
            chosen.setdefault(i, []).append((question, [answer]))
        for i, turns in chosen.items():
            yield _question_row(rows, i, "qa", turns)


def _labelled(sets: Sequence[Rows]) -> list[Rows]:
    return [rows for rows in sets if rows.has("label_name")]


def _captioned(sets: Sequence[Rows]) -> list[Rows]:
    return [rows for rows in sets if rows.has("captions") and not rows.has("label_name")]


def _sample(sets: Sequence[Rows], limit: int, rng: random.Random) -> Iterator[tuple[Rows, int]]:
    for rows in sets:
        for i in rng.sample(range(len(rows)), min(limit // len(sets), len(rows))):
            yield rows, i


def _question_row(rows: Rows, i: int, task: str, asked: Sequence[tuple[str, list[str]]]) -> dict[str, Any]:
    questions, answers = zip(*asked, strict=True)
    row = {"image": rows.images[i], "questions": list(questions), "answers": list(answers)}
    return {**row, "task": task, "source": rows.name, "id": f"{rows.name}-{i}"}


# ------------------------------------------------------------------------------------------- small things
def by_picture(asked: Sequence[tuple[int, facts.Fact, bool]], count: int) -> list[list[Known]]:
    """What `balance` chose, for pictures 0 to count - 1."""
    found: list[list[Known]] = [[] for _ in range(count)]
    for picture, fact, true in asked:
        found[picture].append((fact, true))
    return found


def chunks(turns: Sequence[Turn], size: int) -> list[list[Turn]]:
    """Parts of nearly equal length, at most `size`."""
    parts = -(-len(turns) // size)
    return [list(turns[len(turns) * k // parts : len(turns) * (k + 1) // parts]) for k in range(parts)]


def write_questions(
    sets: Sequence[str],
    output: Path,
    *,
    split: Literal["train", "val"] | None = None,
    seed: int = 0,
    limit: int = 600,
) -> list[tuple[Path, int, int]]:
    """What `tokenflow questions` does: of train, conversations, SET-train.parquet, and descriptions,
    SET-align.parquet; of val, questions, TASK-val.parquet.

    Args:
        sets: folders of parquet files, or hub names, with captions, labels or questions.
        output: the folder for the files.
        split: only one of the two.
        seed: of what is asked, and how.
        limit: about so many questions a task of val; half as many captions.

    Returns:
        (File, pictures, questions) of each file.

    Raises:
        UserError: no set is given, one cannot be read or has nothing to ask about, or two have the same name.
    """
    if not sets:
        raise UserError("give at least one set with captions, labels or questions")
    if limit < 4:
        raise UserError(f"--limit must be at least 4, got {limit}")
    for path in sets:
        if Path(path).is_file():
            raise UserError(f"{path} is a file: give the folder, whose train and val are kept apart")
    written = []
    for part in ("train", "val") if split is None else (split,):
        opened = [read_rows(path, part) for path in sets]
        names = [rows.name for rows in opened]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two sets are called {doubled.pop()}; their files would have the same name")
        if part == "val":
            made = {f"{task}-val": rows for task, rows in tasks(opened, limit, seed).items()}
        else:
            made = {f"{name}-train": rows for name, rows in conversations(opened, seed).items()}
            made |= {f"{name}-align": rows for name, rows in descriptions(opened, seed).items()}
        for name, rows in made.items():
            file = output / f"{name}.parquet"
            write_rows(rows, file)
            turns = sum(len(row.get("questions") or row["conversations"][::2]) for row in rows)
            written.append((file, len(rows), turns))
    return written
