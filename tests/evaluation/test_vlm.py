"""Questions and answers: the scores by hand, and a set asked from parquet to a result."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from small_model import save_small_chat
from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.evaluation import report, vlm
from tokenflow.evaluation.answers import (
    Question,
    each_figure,
    equal_answers,
    main_figure,
    normalise,
    score,
    yes_or_no,
)
from tokenflow.evaluation.options import VlmEval
from tokenflow.evaluation.vlm import questions_of


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A fire_alarm.", "fire alarm", True),
        ("Two", "2", True),
        ("books, bin", "bin, the books", True),
        ("chair", "chairs", False),
        ("The man's hat", "mans hat", True),
        ("", "hat", False),
    ],
)
def test_answers_are_compared_as_words(one, other, equal):
    assert equal_answers(one, other) is equal


def test_yes_and_no_are_first_words():
    said = ("Yes, there is.", "no", "NO!", "The answer is yes", "Yesterday", "")
    assert [yes_or_no(text) for text in said] == ["yes", "no", "no", None, None, None]
    assert normalise("The Yes") == "yes"


def test_scores_by_hand():
    def asked(expected: str, given: str) -> Question:
        return Question(0, "?", (expected,), given)

    closed = [
        asked("yes", "yes"),
        asked("yes", "no"),
        asked("no", "yes"),
        asked("no", "No."),
        asked("no", "a cat"),
    ]
    found = score(closed)["yes/no"]
    assert found["accuracy"] == 2 / 5
    assert found["precision"] == found["recall"] == found["F1"] == 1 / 2
    assert (found["yes share"], found["unreadable"], found["commoner answer"]) == (2 / 5, 1 / 5, 3 / 5)
    opened = [Question(0, "?", ("cat", "kitten"), "a kitten"), asked("dog", "cat")]
    assert score(closed + opened)["open"] == {"exact match": 1 / 2, "questions": 2}
    assert score(closed + opened)["accuracy"] == 3 / 7
    assert "open" not in score(closed)
    never = score([asked("no", "no")])["yes/no"]
    assert (never["precision"], never["recall"], never["F1"], never["accuracy"]) == (0, 0, 0, 1)
    with pytest.raises(UserError, match="no question could be asked"):
        score([])


def test_tasks_are_scored_apart():
    def asked(task: str, expected: str | tuple, given: str, source: str = "a") -> Question:
        return Question(0, "?", (expected,) if isinstance(expected, str) else expected, given, task, source)

    references = (("a dog runs on the grass", "a dog is running"), ("two men sit on a bench",))
    questions = [
        asked("yes-no", "yes", "yes"),
        asked("yes-no", "no", "yes"),
        asked("what-is-it", ("tabby cat", "tabby"), "A tabby."),
        asked("what-is-it", "rose", "tulip", "b"),
        asked("captions", references[0], references[0][0]),
        asked("captions", references[1], "two men sit on a bench"),
    ]
    found = score(questions)
    assert (found["yes-no"]["accuracy"], found["yes-no"]["yes share"]) == (1 / 2, 1)
    assert found["what-is-it"] == {"accuracy": 1 / 2, "accuracy, a": 1, "accuracy, b": 0, "questions": 2}
    assert 5 < found["captions"]["CIDEr-D"] < 10
    name, figure, error = main_figure(found["captions"])
    assert (name, figure) == ("CIDEr-D", found["captions"]["CIDEr-D"])
    assert error == pytest.approx(10 - figure)  # two figures, one of them 10
    assert main_figure(found["yes-no"]) == ("accuracy", 1 / 2, pytest.approx((1 / 8) ** 0.5))
    assert found["average"] == pytest.approx((1 / 2 + 1 / 2 + figure) / 3)
    assert "average" not in score(questions[:2])
    each = each_figure(questions)
    assert (each["yes-no"], each["what-is-it"]) == ([1, 0], [1, 0])
    assert sum(each["captions"]) / 2 == figure


def test_rows_of_both_layouts():
    many = questions_of({"questions": ["a?", "b?"], "answers": ["1", ["2", "two"]]}, 7)
    assert many == [Question(7, "a?", ("1",)), Question(7, "b?", ("2", "two"))]
    assert questions_of({"question": "a?", "answer": "1"}, 0) == [Question(0, "a?", ("1",))]
    assert questions_of({"question": None, "answer": None}, 0) == []
    row = {"questions": ["a?"], "answers": [["1"]], "task": "qa", "source": "daquar", "id": "7"}
    assert questions_of(row, 0) == [Question(0, "a?", ("1",), task="qa", source="daquar")]
    with pytest.raises(UserError, match=r"needs columns question and answer.*there are caption"):
        questions_of({"caption": "x"}, 0)
    with pytest.raises(UserError, match="2 questions but 1 answers"):
        questions_of({"questions": ["a?", "b?"], "answers": ["1"]}, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "answer": []}, "row 3: the question 'a\\?' has no answer"),
        ({"question": "a?", "answer": None}, "has no answer"),
        ({"questions": ["a?", "b?"], "answers": ["1", ["2", None]]}, "the question 'b\\?' has no answer"),
        ({"questions": ["a?", None], "answers": ["1", "2"]}, "row 3: the question None is no text"),
        ({"question": "a?", "answer": "1", "task": "average"}, "row 3: no task can be called 'average'"),
    ],
)
def test_rows_that_would_be_counted_wrongly_are_named(row, message):
    with pytest.raises(UserError, match=message):
        questions_of(row, 3)


@pytest.fixture(scope="module")
def chat_folder(small_model_folder, tmp_path_factory) -> Path:
    return save_small_chat(tmp_path_factory.mktemp("chat"), small_model_folder)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A set of four pictures: one broken, one without questions."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    folder.mkdir()
    rows = []
    for i, colour in enumerate(("red", "green", "blue", "grey")):
        file = io.BytesIO()
        Image.new("RGB", (40, 30 + i), colour).save(file, "png")
        data = b"no picture" if i == 1 else file.getvalue()
        questions = [] if i == 2 else ["is it red ?", "what colour is it, and is it a long question ?"]
        answers = ["yes" if i == 0 else "no", colour][: len(questions)]
        rows.append({"image": {"bytes": data, "path": None}, "questions": questions, "answers": answers})
    pq.write_table(pa.Table.from_pylist(rows), folder / "val.parquet")
    return folder


def test_a_set_is_asked_from_parquet_to_a_file(chat_folder, asked, tmp_path, caplog):
    options = VlmEval(
        data=(str(asked),),
        model=str(chat_folder),
        max_new_tokens=4,
        out=str(tmp_path / "r.json"),
        answers=str(tmp_path / "answers.jsonl"),
    )
    result = vlm.run(options)
    assert report.read(tmp_path / "r.json") == result
    assert result["skipped"] == 1
    assert "skipped a picture" in caplog.text
    assert "row 1" in caplog.text
    assert result["metrics"]["yes/no"]["questions"] == result["metrics"]["open"]["questions"] == 2
    assert result["fingerprint"]["reference"]["pictures"] == 2
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == [0, 0, 3, 3]
    assert lines[2]["expected"] == ["no"]


def test_answers_are_those_of_ask_whatever_the_batch(chat_folder):
    from tokenflow.understanding import ask, load

    model, processor = load(chat_folder, device="cpu")
    seen: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    questions = [
        Question(3, "what colour is this one here ?", ("red",)),
        Question(5, "is it red ?", ("no",)),
        Question(5, "describe it", ("a b", "c"), task="captions"),
        Question(3, "why ?", ("so",)),
        Question(8, "is it ?", ("yes",)),
    ]
    options = {"instruction": "One word.", "max_new_tokens": 12}
    together = vlm.answer(model, processor, pictures, questions, **options, batch_size=2)
    assert sum(seen) == 3  # five questions, three looks
    alone = vlm.answer(model, processor, pictures, questions, **options, batch_size=1)
    asked_singly = []
    for q in questions:
        caption = q.task == "captions"
        text = q.question if caption else f"{q.question}\nOne word."
        picture = pictures[{3: 0, 5: 1, 8: 2}[q.picture]]
        asked_singly.append(ask(model, processor, picture, text, max_new_tokens=32 if caption else 12))
    assert [q.given for q in together] == [q.given for q in alone] == asked_singly
    assert [q.question for q in together] == [q.question for q in questions]


def test_several_sets_and_plain_text_in_one_result(chat_folder, asked, tmp_path):
    rows = pq.read_table(asked / "val.parquet").to_pylist()[:1]
    captions = [{**row, "questions": ["describe it"], "answers": [["a b c d", "e f"]]} for row in rows]
    pq.write_table(
        pa.Table.from_pylist([{**row, "task": "captions"} for row in captions]), tmp_path / "c.parquet"
    )
    data = (str(asked), str(tmp_path / "c.parquet"))
    out = tmp_path / "r.json"
    result = vlm.run(VlmEval(data=data, model=str(chat_folder), text=True, max_new_tokens=2, out=str(out)))
    assert set(result["metrics"]) == {
        "other",
        "captions",
        "average",
        "text",
    }  # no parts: what it was is unknown
    assert result["metrics"]["other"]["questions"] == 4
    assert set(result["fingerprint"]["reference"]) == {"shapes", "c.parquet"}
    assert result["model"]["features"] == "last"
    assert len(result["each"]["other"].split()) == 4
    assert report.read(out) == result
    text = vlm.run(VlmEval(model=str(chat_folder), text=True))
    assert text["metrics"] == {"text": result["metrics"]["text"]}
    with pytest.raises(UserError, match="nothing to ask"):
        vlm.run(VlmEval(model=str(chat_folder)))


def test_sets_of_one_name_are_told_apart(chat_folder, asked):
    from tokenflow.understanding import load

    model, processor = load(chat_folder, device="cpu")
    sources = [Source(str(asked), split="val"), *[Source(str(asked / "val.parquet"))] * 2]
    result, _ = vlm.evaluate_questions(model, processor, sources, max_new_tokens=1, limit=1)
    references = result["fingerprint"]["reference"]
    assert [*references] == ["shapes", "val.parquet", "val.parquet 2"]
    assert all(name == reference["name"] for name, reference in references.items())


def test_sets_that_cannot_be_asked_are_one_line(chat_folder, asked, small_model_folder):
    from tokenflow.understanding import load

    model, processor = load(chat_folder, device="cpu")
    with pytest.raises(UserError, match="no question could be asked"):
        vlm.evaluate_questions(model, processor, [Source(str(asked), split="val")], limit=0)
    with pytest.raises(UserError, match="must be at least 1"):
        vlm.run(VlmEval(data=(str(asked),), model=str(chat_folder), batch_size=0))
    with pytest.raises(UserError, match="--limit must be at least 1"):
        vlm.run(VlmEval(data=(str(asked),), model=str(chat_folder), limit=-1))
    with pytest.raises(UserError, match="answers no questions"):
        vlm.run(VlmEval(data=(str(asked),), model=str(small_model_folder)))


def test_the_row_is_named_in_whatever_set_it_is(chat_folder, asked, tmp_path):
    from tokenflow.understanding import load

    def fails(match: str, *questions: str | None) -> None:
        rows = [{"image": image, "question": text, "answer": "yes"} for text in questions]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "more.parquet")
        sources = [Source(str(asked), split="val"), Source(str(tmp_path / "more.parquet"))]
        with pytest.raises(UserError, match=rf"^{tmp_path}/more.parquet \(train\) {match}"):
            vlm.evaluate_questions(model, processor, sources, max_new_tokens=2)

    model, processor = load(chat_folder, device="cpu")
    image = pq.read_table(asked / "val.parquet").to_pylist()[0]["image"]
    long = r"row 1: the question with its image has \d+ tokens and the answer may take 2, .* reads 512"
    fails(long, "is it ?", "why " * 600, "is it ?")
    fails("row 2: the question ' ' is no text", "is it ?", None, " ")
