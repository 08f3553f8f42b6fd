"""Questions about pictures, asked many at a time; each picture is encoded once. `answers` has the scores."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenflow.data.images import ImageError, read_image
from tokenflow.data.sources import Source, default_split, encoded_image, open_source, stream_rows
from tokenflow.errors import UserError
from tokenflow.evaluation import report
from tokenflow.evaluation.answers import AVERAGE, CAPTIONS, Question, each_figure, score
from tokenflow.evaluation.options import VlmEval
from tokenflow.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

logger = logging.getLogger(__name__)

_CAPTION_TOKENS = 32  # a caption of the usual sets has a dozen words
_PICTURES = 64  # at a time: their questions are sorted by length, so that batches waste little


def questions_of(row: dict[str, Any], picture: int) -> list[Question]:
    """The questions of a row: columns `question` and `answer`, or `questions` and `answers`; `task` and
    `source` if there are such.

    One question may have several answers that count: a list in `answer`, or lists in `answers`. Rows without
    a question give none.

    Raises:
        UserError: there are no such columns, not as many answers as questions, a question that is no text or
            has no answer, or a task called "average".
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
        raise UserError(f"row {picture}: {len(asked)} questions but {len(answers)} answers")
    several = [answer if isinstance(answer, list) else [answer] for answer in answers]
    for question, expected in zip(asked, several, strict=True):
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"row {picture}: the question {question!r:.80} is no text")
        if None in expected or not any(str(text).strip() for text in expected):
            raise UserError(f"row {picture}: the question {question!r:.80} has no answer")
    where = {"task": str(row.get("task") or ""), "source": str(row.get("source") or "")}
    if where["task"] == AVERAGE:
        raise UserError(f"row {picture}: no task can be called {AVERAGE!r}, as the mean of all tasks is")
    return [
        Question(picture, question, tuple(map(str, expected)), **where)
        for question, expected in zip(asked, several, strict=True)
    ]


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Image.Image],
    questions: Sequence[Question],
    *,
    instruction: str = "",
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> list[Question]:
    """Questions with the model's likeliest answers, in their order; each picture is encoded once.

    Args:
        pictures: those of the questions, in the order of their numbers.
        instruction: a line after each question, but not where a caption is asked for.
        max_new_tokens: where answers are cut off; captions at 32 tokens, if that is more.
        batch_size: pictures and questions at a time.

    Raises:
        UserError: a question and its answer exceed the model's context.
    """
    from tokenflow.understanding.ask import encode_images, generate, tokenize, user_message

    features: list[Tensor] = []
    for start in range(0, len(pictures), batch_size):
        features += encode_images(model, processor, pictures[start : start + batch_size])
    places = {number: place for place, number in enumerate(sorted({q.picture for q in questions}))}
    # Captions apart, since a batch goes on until its longest answer ends.
    order = sorted(
        range(len(questions)), key=lambda i: (questions[i].task == CAPTIONS, len(questions[i].question))
    )
    captions = sum(q.task == CAPTIONS for q in questions)
    done: dict[int, Question] = {}
    for part, limit in (
        (order[: len(order) - captions], max_new_tokens),
        (order[len(order) - captions :], max(max_new_tokens, _CAPTION_TOKENS)),
    ):
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            turns = []
            for i in batch:
                hint = [instruction] if instruction and questions[i].task != CAPTIONS else []
                turns.append([user_message(processor, "\n".join([questions[i].question.strip(), *hint]), 1)])
            inputs = tokenize(model, processor, turns)
            _check_length(model, [questions[i] for i in batch], inputs, limit)
            seen = [features[places[questions[i].picture]] for i in batch]
            options = {"max_new_tokens": limit, "do_sample": False}
            given = generate(model, processor, inputs, seen, **options)
            done |= {i: replace(questions[i], given=text) for i, text in zip(batch, given, strict=True)}
    return [done[i] for i in range(len(questions))]


def _check_length(
    model: LlavaForConditionalGeneration,
    questions: Sequence[Question],
    inputs: dict[str, Tensor],
    answer: int,
) -> None:
    context: int = model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
    for question, given in zip(questions, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if given + answer > context:
            raise UserError(
                f"row {question.picture}: the question with its image has {given} tokens and the answer may "
                f"take {answer}, but this model reads {context}: shorten the question or lower max_new_tokens"
            )


def evaluate_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    sources: Sequence[Source],
    *,
    name: str = "model",
    limit: int | None = None,
    instruction: str = "",
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> tuple[report.Result, list[Question]]:
    """Ask every question of `sources` and score the answers.

    Args:
        model, processor: a LLaVA; see `tokenflow.understanding.load`.
        sources: rows as `questions_of` reads them.
        name: what the result calls the model.
        limit: only the first pictures of each source.
        instruction, max_new_tokens, batch_size: as in `answer`.

    Returns:
        A result for `report`, and the questions with the answers given. Besides the usual it has "each": by
        task the figures of the single questions, so that two models can be compared question by question.

    Raises:
        UserError: no questions, columns that do not hold them, or one that does not fit the model's context.
    """
    started = time.perf_counter()
    done: list[Question] = []
    references: list[dict[str, Any]] = []
    skipped = 0
    ends: list[str] = []
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for source in sources:
        digest = hashlib.sha256()
        asked: list[Question] = []
        broken: list[str] = []
        reading = _read(source, limit, broken)
        while chunk := list(islice(reading, _PICTURES)):
            for picture, questions in chunk:
                digest.update(picture.tobytes())
                digest.update(json.dumps([[q.question, q.expected, q.task] for q in questions]).encode())
            pictures = [picture for picture, _ in chunk]
            flat = [question for _, questions in chunk for question in questions]
            try:
                asked += answer(model, processor, pictures, flat, instruction=instruction, **limits)
            except UserError as error:
                raise UserError(f"{source} {error}") from error
        first = done[-1].picture + 1 if done else 0
        done += [replace(question, picture=first + question.picture) for question in asked]
        skipped += len(broken)
        ends.append(source.path_or_name.rstrip("/").rpartition("/")[2])
        number = ends.count(ends[-1])
        references.append(
            {
                "name": ends[-1] if number == 1 else f"{ends[-1]} {number}",  # a/val.parquet, b/val.parquet
                "split": source.split,
                "pictures": len({question.picture for question in asked}),
                "sha256": digest.hexdigest(),
            }
        )
    fingerprint: dict[str, Any] = {
        "reference": references[0] if len(references) == 1 else {r["name"]: r for r in references},
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
        "model": fingerprint_of(model, name),
        "each": {task: " ".join(f"{x:.4g}" for x in each) for task, each in each_figure(done).items()},
        "skipped": skipped,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result, done


def fingerprint_of(model: LlavaForConditionalGeneration, name: str) -> dict[str, Any]:
    """`report.model_fingerprint`, and under "features" the strategy of a TokenFlow tower; "continuous" for
    any other tower (Tab. 8 and 9)."""
    strategy = getattr(model.config.vision_config, "feature_strategy", "continuous")
    return {**report.model_fingerprint(model, name), "features": strategy}


def _read(
    source: Source, limit: int | None, broken: list[str]
) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Pictures with questions, numbered by their rows; those that cannot be read are added to `broken`."""
    opened = open_source(source)
    total = None if source.streaming else min(len(opened.dataset), limit or len(opened.dataset))
    rows = islice(stream_rows(source, opened.dataset), limit)
    for number, row in enumerate(tqdm(rows, total=total, unit="image", desc=source.path_or_name[-24:])):
        try:
            asked = questions_of({key: row[key] for key in opened.columns}, number)
        except UserError as error:
            raise UserError(f"{source} {error}") from error
        if not asked:
            continue
        try:
            name = f"{source} row {number}"
            picture = read_image(encoded_image(row[opened.image_column], name), name=name)
        except ImageError as error:
            broken.append(name)
            logger.warning("skipped a picture: %s", error)
            continue
        yield picture, asked


def run(options: VlmEval) -> report.Result:
    """What `tokenflow eval vlm` does: load, ask, score, write the files where asked."""
    from tokenflow.codec import check_writable
    from tokenflow.evaluation.knowledge import compare_knowledge, fingerprint_of_facts
    from tokenflow.understanding import load

    if min(options.batch_size, options.max_new_tokens, 1 if options.limit is None else options.limit) < 1:
        raise UserError("--batch-size, --max-new-tokens and --limit must be at least 1")
    if not options.data and not options.text:
        raise UserError("nothing to ask: give --data SET, --text or --tasks")
    for path in (options.out, options.answers):
        if path is not None:
            check_writable(path)
    sources = [Source(data, split=options.split or default_split(data)) for data in options.data]
    model, processor = load(options.model, device=options.device, dtype=options.dtype)
    started = time.perf_counter()
    done: list[Question] = []
    result: report.Result = {
        "kind": "questions",
        "metrics": {},
        "fingerprint": {"dtype": options.dtype, "backend": model.device.type},
    }
    if sources:
        result, done = evaluate_questions(
            model,
            processor,
            sources,
            name=options.model,
            limit=options.limit,
            instruction=options.instruction,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )
    if options.text:
        result["metrics"] |= compare_knowledge(model, processor, options.model, options.batch_size)
        result["fingerprint"]["text"] = fingerprint_of_facts()
        result["model"] = fingerprint_of(model, options.model)
        result["seconds"] = round(time.perf_counter() - started, 1)
    result["command"] = report.command_line()
    if options.answers is not None:
        with atomic_write(options.answers) as temporary:
            lines = [json.dumps(asdict(question), ensure_ascii=False) for question in done]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.out is not None:
        report.write(result, options.out)
    return result
