"""convert, eval, train and demo reach their rooms, and what goes wrong there is one line."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import the_error
from tokenflow.cli import main
from tokenflow.training.loop import TrainResult


@pytest.fixture
def run(small_model_folder, capsys, tmp_path, monkeypatch):
    """Runs a command beside a folder of pictures, `photos`; `{model}` is the small model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, colour in enumerate(("teal", "gold", "navy", "white")):
        square = Image.linear_gradient("L").resize((40 + i, 36))
        Image.merge("RGB", (square, square.rotate(180), Image.new("L", square.size, 40 * i))).save(
            tmp_path / "photos" / f"{colour}.png"
        )

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a).replace("{model}", str(small_model_folder)) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_convert_refuses_what_is_no_released_checkpoint(run):
    assert "nothing.pt" in the_error(run("convert", "nothing.pt", "out"))
    Path("code.pt").write_bytes(pickle.dumps(Harmful()))
    assert "code.pt" in the_error(run("convert", "code.pt", "out"))
    torch.save({"ema": {"weight": torch.zeros(3)}}, "foreign.pt")
    assert "foreign.pt" in the_error(run("convert", "foreign.pt", "out"))
    assert not Path("harm").exists()
    assert not Path("out").exists()


def test_results_are_compared_only_if_measured_alike(run):
    measure = ("eval", "reconstruction", "--data", "photos", "--split", "train", "--model", "{model}")
    code, out, _ = run(*measure, "--out", "all.json")
    assert code == 0
    assert "PSNR (dB)" in out
    assert run(*measure, "--out", "again.json")[0] == 0
    assert run(*measure, "--limit", 3, "--out", "three.json")[0] == 0
    assert json.loads(Path("all.json").read_text())["kind"] == "reconstruction"
    code, out, _ = run("eval", "compare", "all.json", "again.json")
    assert code == 0
    assert "SSIM" in out
    assert "fingerprints differ in" in the_error(run("eval", "compare", "all.json", "three.json"))
    assert "missing.json" in the_error(run("eval", "compare", "missing.json"))
    assert "unknown model" in the_error(run(*measure[:-1], "tokenflow-tni"))


def test_a_missing_package_is_named_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "torchmetrics.functional.image", raising=False)
    measure = ("eval", "reconstruction", "--data", "photos", "--split", "train", "--model", "{model}")
    assert "pip install 'tokenflow-vision[eval]'" in the_error(run(*measure))


def test_train_makes_a_model_that_the_other_commands_load(run):
    train = ("train", "tokenizer", "tokenflow-tiny", "--model.preset", "{model}", "--model.teacher", "None")
    losses = ("--loss.semantic-weight", 0, "--loss.perceptual", "none")
    data = ("--data.sources", "photos", "--data.batch-size", 2, "--data.num-workers", 0)
    code, out, _ = run(*train, *losses, *data, "--steps", 1, "--trackers", "--output-dir", "runs/mine")
    assert code == 0
    assert "runs/mine/export" in out
    code, out, _ = run("reconstruct", "photos", "-m", "runs/mine/export", "-o", "rebuilt")
    assert code == 0
    assert len(list(Path("rebuilt").iterdir())) == 5
    assert "no-photos" in the_error(run(*train, *losses, "--data.sources", "no-photos", "--steps", 1))


def test_values_out_of_range_are_one_line(run):
    train = ("train", "understanding", "tokenflow-tiny-chat")
    assert "seed=-1 must be from 0 to" in the_error(run(*train, "--seed", -1))
    assert "lr=nan must be finite" in the_error(run(*train, "--align.lr", "nan"))
    assert "unknown tracker 'nope'" in the_error(run(*train, "--trackers", "nope"))


@pytest.mark.parametrize(
    ("stopped_by", "expected"), [("steps", 0), ("max_minutes", 0), ("SIGINT", 130), ("SIGTERM", 143)]
)
def test_a_training_stopped_by_a_signal_does_not_look_done(run, monkeypatch, stopped_by, expected):
    done = TrainResult(3, stopped_by, Path("runs/mine/export"))
    monkeypatch.setattr("tokenflow.training.loop.train_tokenizer", lambda recipe: done)
    code, out, _ = run("train", "tokenizer", "tokenflow-tiny")
    assert code == expected
    assert out == f"step 3 (stopped by {stopped_by}); the model: runs/mine/export\n"


def test_demo_says_where_page_and_picture_are(run, monkeypatch):
    for bundled in ("bundled_gallery", "bundled_answers"):  # minutes, and tests/demo/ has small ones
        monkeypatch.setattr(f"tokenflow.demo.{bundled}", lambda *_: None)
    code, out, _ = run("demo", "photos", "-m", "{model}", "-o", "shown")
    assert code == 0
    assert f"page:    {Path('shown/index.html').resolve()}" in out
    assert Path("shown/demo.png").is_file()
    Path("file").touch()
    assert "cannot write file/index.html" in the_error(run("demo", "-m", "{model}", "-o", "file"))
