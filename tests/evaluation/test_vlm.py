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
from tokenflow.evaluation.options import VlmEval
from tokenflow.evaluation.vlm import Question, equal_answers, normalise, questions_of, score, yes_or_no


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


def test_rows_of_both_layouts():
    many = questions_of({"questions": ["a?", "b?"], "answers": ["1", ["2", "two"]]}, 7)
    assert many == [Question(7, "a?", ("1",)), Question(7, "b?", ("2", "two"))]
    assert questions_of({"question": "a?", "answer": "1"}, 0) == [Question(0, "a?", ("1",))]
    assert questions_of({"question": None, "answer": None}, 0) == []
    with pytest.raises(UserError, match=r"needs columns question and answer.*there are caption"):
        questions_of({"caption": "x"}, 0)
    with pytest.raises(UserError, match="2 questions but 1 answers"):
        questions_of({"questions": ["a?", "b?"], "answers": ["1"]}, 0)


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


def test_a_set_is_asked_from_parquet_to_a_file(chat_folder, asked, tmp_path):
    options = VlmEval(
        data=str(asked),
        model=str(chat_folder),
        max_new_tokens=4,
        out=str(tmp_path / "r.json"),
        answers=str(tmp_path / "answers.jsonl"),
    )
    result = vlm.run(options)
    assert report.read(tmp_path / "r.json") == result
    assert result["skipped"] == 1
    assert result["metrics"]["yes/no"]["questions"] == result["metrics"]["open"]["questions"] == 2
    assert result["fingerprint"]["reference"]["pictures"] == 2
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == [0, 0, 3, 3]
    assert lines[2]["expected"] == ["no"]


def test_answers_are_those_of_ask_whatever_the_batch(chat_folder, asked):
    from tokenflow.understanding import ask, load

    model, processor = load(chat_folder, device="cpu")
    towers: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))
    picture = Image.new("RGB", (40, 30), "red")
    questions = questions_of(
        {"questions": ["is it red ?", "what colour is this one ?"], "answers": ["yes", "red"]}, 0
    )
    together = vlm.answer(model, processor, picture, questions, instruction="One word.", batch_size=2)
    assert len(towers) == 1  # two questions, one look
    alone = vlm.answer(model, processor, picture, questions, instruction="One word.", batch_size=1)
    asked_singly = [
        ask(model, processor, picture, f"{q.question}\nOne word.", max_new_tokens=16) for q in questions
    ]
    assert [q.given for q in together] == [q.given for q in alone] == asked_singly


def test_sets_that_cannot_be_asked_are_one_line(chat_folder, asked, small_model_folder):
    from tokenflow.understanding import load

    model, processor = load(chat_folder, device="cpu")
    with pytest.raises(UserError, match="no question could be asked"):
        vlm.evaluate_questions(model, processor, Source(str(asked), split="val"), limit=0)
    with pytest.raises(UserError, match="must be at least 1"):
        vlm.run(VlmEval(data=str(asked), model=str(chat_folder), batch_size=0))
    with pytest.raises(UserError, match="answers no questions"):
        vlm.run(VlmEval(data=str(asked), model=str(small_model_folder)))
