"""Questions about pictures, asked and scored: yes/no questions as POPE does, all others as GQA does.

A question counts as a yes/no question if its expected answer is one of the two. Of the model's answer to
it the first word is read; anything but yes or no is wrong, and counted as unreadable. Other answers count if
they equal an expected one after lower-casing and without punctuation, articles and underscores; number words
are numbers, and a list is compared without regard to its order.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenflow.data.images import ImageError, read_image
from tokenflow.data.sources import Source, default_split, encoded_image, open_source, stream_rows
from tokenflow.errors import UserError
from tokenflow.evaluation import report
from tokenflow.evaluation.options import VlmEval
from tokenflow.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """A question about picture number `picture`, the answers that count, and the one that was given."""

    picture: int
    question: str
    expected: tuple[str, ...]
    given: str = ""

    @property
    def is_yes_no(self) -> bool:
        return all(normalise(answer) in ("yes", "no") for answer in self.expected)


# --------------------------------------------------------------------------------------------- the scores
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
        `accuracy` of all; where there are such, under "yes/no" the accuracy, precision, recall and F1 of yes,
        the shares of yes among the answers and of unreadable answers, and what always saying the commoner of
        the two would reach; under "open" the exact matches; and the number of questions of each kind.

    Raises:
        UserError: there is no question.
    """
    if not questions:
        raise UserError("the evaluation set is empty: no question could be asked; check data and split")
    closed = [q for q in questions if q.is_yes_no]
    others = [q for q in questions if not q.is_yes_no]
    metrics: dict[str, Any] = {}
    right = 0
    if closed:
        pairs = [(normalise(q.expected[0]), yes_or_no(q.given)) for q in closed]
        agreed = sum(wanted == said for wanted, said in pairs)
        hits = pairs.count(("yes", "yes"))
        said_yes = sum(said == "yes" for _, said in pairs)
        wanted_yes = sum(wanted == "yes" for wanted, _ in pairs)
        right += agreed
        metrics["yes/no"] = {
            "accuracy": agreed / len(pairs),
            "precision": hits / said_yes if said_yes else 0.0,
            "recall": hits / wanted_yes if wanted_yes else 0.0,
            "F1": 2 * hits / (said_yes + wanted_yes) if said_yes + wanted_yes else 0.0,
            "yes share": said_yes / len(pairs),
            "unreadable": sum(said is None for _, said in pairs) / len(pairs),
            "commoner answer": max(wanted_yes, len(pairs) - wanted_yes) / len(pairs),
            "questions": len(pairs),
        }
    if others:
        matches = sum(any(equal_answers(q.given, answer) for answer in q.expected) for q in others)
        right += matches
        metrics["open"] = {"exact match": matches / len(others), "questions": len(others)}
    return {"accuracy": right / len(questions), **metrics}


# ----------------------------------------------------------------------------------- asking the questions
def questions_of(row: dict[str, Any], picture: int) -> list[Question]:
    """The questions of a row: columns `question` and `answer`, or `questions` and `answers`.

    One question may have several answers that count: a list in `answer`, or lists in `answers`. Rows without
    a question give none.

    Raises:
        UserError: there are no such columns, or not as many answers as questions.
    """
    if "questions" in row and "answers" in row:
        asked, answers = row["questions"] or [], row["answers"] or []
    elif "question" in row and "answer" in row:
        asked, answers = ([], []) if row["question"] is None else ([row["question"]], [row["answer"]])
    else:
        raise UserError(
            f"needs columns question and answer, or questions and answers; there are {', '.join(row)}"
        )
    if len(asked) != len(answers):
        raise UserError(f"picture {picture}: {len(asked)} questions but {len(answers)} answers")
    several = [answer if isinstance(answer, list) else [answer] for answer in answers]
    return [
        Question(picture, question, tuple(map(str, expected)))
        for question, expected in zip(asked, several, strict=True)
    ]


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    picture: Image.Image,
    questions: Sequence[Question],
    *,
    instruction: str = "",
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> list[Question]:
    """The questions about one picture with the model's likeliest answers; the picture is encoded once."""
    from tokenflow.understanding.ask import encode_images, generate, tokenize, user_message

    features: list[Tensor] = encode_images(model, processor, [picture])
    done: list[Question] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        texts = ["\n".join([q.question.strip(), *([instruction] if instruction else [])]) for q in batch]
        inputs = tokenize(model, processor, [[user_message(processor, text, 1)] for text in texts])
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        given = generate(model, processor, inputs, features * len(batch), **options)
        done += [replace(q, given=text) for q, text in zip(batch, given, strict=True)]
    return done


def evaluate_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    source: Source,
    *,
    name: str = "model",
    limit: int | None = None,
    instruction: str = "",
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> tuple[report.Result, list[Question]]:
    """Ask every question of `source` and score the answers.

    Args:
        model, processor: a LLaVA; see `tokenflow.understanding.load`.
        source: rows as `questions_of` reads them.
        name: what the result calls the model.
        limit: only the first pictures.
        instruction: a line after each question.
        max_new_tokens: where answers are cut off.
        batch_size: questions at a time; changes the speed, not the answers.

    Returns:
        A result for `report`, and the questions with the answers given.

    Raises:
        UserError: no questions, or columns that do not hold them.
    """
    started = time.perf_counter()
    opened = open_source(source)
    total = None if source.streaming else len(opened.dataset)
    digest, done, skipped = hashlib.sha256(), [], 0
    rows: Iterator[tuple[int, dict[str, Any]]] = enumerate(islice(stream_rows(source, opened.dataset), limit))
    for number, row in tqdm(rows, total=min(total or 0, limit or total or 0) or None, unit="image"):
        try:
            asked = questions_of({key: row[key] for key in opened.columns}, number)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if not asked:
            continue
        try:
            name_of_row = f"{source} row {number}"
            picture = read_image(encoded_image(row[opened.image_column], name_of_row), name=name_of_row)
        except ImageError:
            skipped += 1
            continue
        digest.update(picture.tobytes())
        digest.update(json.dumps([asdict(question) for question in asked]).encode())
        limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        done += answer(model, processor, picture, asked, instruction=instruction, **limits)
    fingerprint = {
        "reference": {
            "name": source.path_or_name.rstrip("/").rpartition("/")[2],
            "split": source.split,
            "pictures": len({question.picture for question in done}),
            "sha256": digest.hexdigest(),
        },
        "instruction": instruction,
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "backend": model.device.type,
    }
    result = {
        "kind": "questions",
        "metrics": score(done),
        "fingerprint": fingerprint,
        "model": report.model_fingerprint(model, name),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result, done


def run(options: VlmEval) -> report.Result:
    """What `tokenflow eval vlm` does: load, ask, score, write the files where asked."""
    from tokenflow.understanding import load

    if options.data is None:
        raise UserError(
            "nothing to ask: give --data (your own questions) or --tasks (the field's benchmarks)"
        )
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be at least 1")
    source = Source(options.data, split=options.split or default_split(options.data))
    result, done = evaluate_questions(
        *load(options.model, device=options.device),
        source,
        name=options.model,
        limit=options.limit,
        instruction=options.instruction,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    result["command"] = report.command_line()
    if options.answers is not None:
        with atomic_write(options.answers) as temporary:
            lines = [json.dumps(asdict(question), ensure_ascii=False) for question in done]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.out is not None:
        report.write(result, options.out)
    return result
