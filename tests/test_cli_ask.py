"""`tokenflow ask` and `tokenflow chat` on real files, good and bad, in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from small_model import save_small_chat
from tokenflow.cli import main

FEW = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def chat_folder(small_model_folder, tmp_path_factory) -> Path:
    return save_small_chat(tmp_path_factory.mktemp("chat"), small_model_folder)


@pytest.fixture
def run(chat_folder, capsys, tmp_path, monkeypatch):
    """Runs a command, with lines for its standard input, in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 30, 30)).save("red.png")
    Image.new("RGB", (30, 40), (20, 30, 220)).save("blue.jpg")

    def run(*arguments: object, lines: str = "", model: object = chat_folder) -> tuple[int, str, str]:
        typed = io.BytesIO(lines.encode(errors="surrogateescape"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8"))
        code = main([*map(str, arguments), "--model", str(model)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_ask_streams_or_prints_json(run):
    code, streamed, _ = run("ask", "red.png", "blue.jpg", "Which is red?", *FEW)
    assert code == 0
    code, out, _ = run("ask", "red.png", "blue.jpg", "Which is red?", *FEW, "--json")
    found = json.loads(out)
    assert found["answer"] == streamed.strip() != ""
    assert found["images"] == ["red.png", "blue.jpg"]
    assert found["question"] == "Which is red?"


def test_sampling_repeats_with_its_seed(run):
    hot = (*FEW, "--temperature", "3")
    said = [run("ask", "red.png", "What?", *hot, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no question; write: tokenflow ask IMAGE"),
        (("red.png",), "there is no question"),
        (("red.png", " "), "there is no question"),
        (("What is it?",), "there is no image"),
        (("red.png", "What", "is it?"), "cannot read image What: no such file (quote a question"),
        (("red.png", "What?", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
        (("red.png", "What?", "--seed", "-1"), "--seed must be from 0 to 2^64 - 1, got -1"),
        (("red.png", "caf\udce9?"), "is not valid UTF-8 text"),
        (("red.png", "What?", "--temperature", "-1"), "--temperature must be a number of at least 0"),
        (("red.png", "a b " * 300), "this model reads 512: shorten the question"),
    ],
)
def test_bad_questions_are_one_line(run, words, message):
    code, out, err = run("ask", *words)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("tokenflow: error: ")
    assert message in err


def test_other_models_are_refused(run, small_model_folder):
    assert "answers no questions" in run("ask", "red.png", "What?", model=small_model_folder)[2]
    assert "no model folder at ./nothing" in run("ask", "red.png", "What?", model="./nothing")[2]


def test_chat_goes_on_after_a_mistake_and_starts_over(run):
    typed = ["What is it?", "/image missing.png", "/imagine", "/image", "/image 'blue.jpg'", "And this?"]
    lines = "\n".join([*typed, "/new", "What is it?", "/quit", "What?"])
    code, out, err = run("chat", "red.png", *FEW, lines=lines)
    assert code == 0
    first, _, again = out.splitlines()
    assert first == again == run("ask", "red.png", "What is it?", *FEW)[1].rstrip("\n")
    errors = [line for line in err.splitlines() if line.startswith("tokenflow: error: ")]
    assert len(errors) == 3
    assert "no such file" in errors[0]
    assert "unknown command /imagine" in errors[1]
    assert "/image needs a file" in errors[2]


def test_chat_goes_on_after_a_line_that_is_no_text(run):
    code, out, err = run("chat", *FEW, lines="caf\udce9?\nWhat is it?")
    assert (code, len(out.splitlines())) == (0, 1)
    assert err.splitlines()[-1] == "tokenflow: error: the question 'caf\\udce9?' is not valid UTF-8 text"


def test_convert_takes_a_released_folder(run, small_model_folder, capsys):
    Path("released").mkdir()
    Path("released", "config.json").write_text('{"model_type": "llama"}')
    assert main(["convert", "released", "out", "--tokenizer", str(small_model_folder)]) == 2
    assert "is no released understanding model: its config says model_type 'llama'" in capsys.readouterr().err
