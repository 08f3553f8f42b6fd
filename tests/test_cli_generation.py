"""tokenize and train text-to-image from the command line, from pictures to a model that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tokenflow.cli import main
from tokenflow.generation.pipeline import TextToImagePipeline


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (36, 40), (60 * i, 100, 200)).save(tmp_path / "photos" / f"{i}.png")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().split("\n")[-1]

    return run


def test_from_pictures_to_a_model_that_draws(run, small_model_folder, other_model_folder):
    (Path("photos") / "broken.png").write_bytes(b"no picture")
    tokenize = ("tokenize", "photos", "-o", "tokens", "-m", small_model_folder)
    code, out, _ = run(*tokenize)
    assert code == 0
    assert "skipped: cannot read image row 4 of photos (train)" in out
    assert "4 views of images (4 of them new), 1 images skipped\ntoken shards: tokens/photos\n" in out
    assert "(0 of them new)" in run(*tokenize)[1]
    code, _, error = run(*tokenize[:-1], other_model_folder)
    assert (code, error.startswith("tokenflow: error: tokens/photos/train-00000")) == (2, True)
    assert "no-photos" in run("tokenize", "no-photos", "-o", "tokens", "-m", small_model_folder)[2]
    assert "name at least one data set" in run("tokenize", "-o", "tokens")[2]

    sizes = (
        "--model.hidden-size",
        16,
        "--model.layers",
        1,
        "--model.heads",
        2,
        "--model.text-vocabulary",
        270,
    )
    train = ("train", "text-to-image", "tokenflow-tiny-t2i", *sizes, "--model.intermediate-size", 32)
    train += ("--data.sources", "tokens/photos", "--data.batch-size", 2, "--steps", 1, "--trackers")
    code, out, _ = run(*train, "--model.tokenizer", small_model_folder, "--output-dir", "run")
    assert (code, out) == (0, "step 1 (stopped by steps); the model: run/export\n")
    assert TextToImagePipeline.from_pretrained("run/export")("", seed=0).images[0].size == (32, 32)
    code, _, error = run(*train, "--model.tokenizer", other_model_folder, "--output-dir", "other")
    assert code == 2
    assert error.startswith("tokenflow: error: these token shards were made by tokenizer")
    assert "did you mean 'tokenflow-tiny-t2i'?" in run("train", "text-to-image", "tokenflow-tiny-t2")[2]
