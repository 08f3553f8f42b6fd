"""`tokenflow generate` on real files, good and bad; a picture says how it was made and is made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from command_line import the_error
from tokenflow.cli import main
from tokenflow.drawing import load_class_pipeline, load_pipeline, read_drawing
from tokenflow.errors import UserError
from tokenflow.generation.limits import MOST_PICTURES
from tokenflow.generation.options import GenerateOptions, sampling


@pytest.fixture
def run(small_pipeline_folder, small_class_folder, small_model_folder, capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; `{t2i}` is the small pipeline, `{var}` the one for labels, `{model}`
    the small tokenizer."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        folders = {
            "{t2i}": small_pipeline_folder, "{var}": small_class_folder, "{model}": small_model_folder,
        }  # fmt: skip
        code = main([str(folders.get(str(a), a)) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def metadata(path) -> dict:
    image = Image.open(path)
    image.load()
    return json.loads(image.text["tokenflow"])


def test_pictures_grid_and_metadata(run, small_pipeline_folder):
    Path("more.txt").write_bytes(b"\xef\xbb\xbfzwei H\xc3\xbcnde\r\n\r\n")
    code, out, err = run(
        "generate", "A cat!", "--prompts", "more.txt", "-o", "out", "-m", "{t2i}",
        "--num-images", 2, "--seed", 5, "--top-k", 9, 1, "--negative-prompt", "a dog",
    )  # fmt: skip
    assert code == 0, err
    names = ["a-cat-5.png", "a-cat-6.png", "zwei-hünde-5.png", "zwei-hünde-6.png"]
    assert out.splitlines() == [*(f"out/{name}" for name in names), "all of them: out/grid.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*names, "grid.png"])
    found = metadata("out/zwei-hünde-6.png")
    assert found | {"model": "", "version": ""} == {
        "version": "", "model": "", "prompt": "zwei Hünde", "seed": 6, "guidance_scale": 7.5,
        "top_k": [9, 1], "top_p": [0.8, 0.0], "temperature": 1.0, "negative_prompt": "a dog",
        "dtype": "float32", "known_codes": [], "known_mask": [], "label": None,
    }  # fmt: skip
    pipe = load_pipeline(str(small_pipeline_folder))
    expected = pipe(["zwei Hünde"], seed=6, top_k=(9, 1), top_p=(0.8, 0), negative_prompt="a dog")
    np.testing.assert_array_equal(pixels("out/zwei-hünde-6.png"), np.asarray(expected.images[0]))
    grid = Image.open("out/grid.png")
    assert (grid.width, grid.height) == (2 * (32 + 8) + 8, 30 + 2 * (32 + 8 + 22))
    np.testing.assert_array_equal(np.asarray(grid)[30:62, 8:40], pixels("out/a-cat-5.png"))


def test_a_picture_is_made_again_from_what_it_says(run):
    assert run("generate", "a cat", "-o", "out", "-m", "{t2i}", "--steps-per-scale", 1, "--seed", 3)[0] == 0
    code, out, _ = run("generate", "--from", "out/a-cat-3.png", "-o", "again")
    assert code == 0
    assert "the same picture as out/a-cat-3.png, pixel by pixel" in out
    np.testing.assert_array_equal(pixels("out/a-cat-3.png"), pixels("again/a-cat-3.png"))
    assert metadata("out/a-cat-3.png") == metadata("again/a-cat-3.png")
    assert [path.name for path in Path("again").iterdir()] == ["a-cat-3.png"]

    image = Image.open("out/a-cat-3.png")
    image.load()
    info = PngInfo()
    info.add_itxt("tokenflow", image.text["tokenflow"])
    image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save("changed.png", pnginfo=info)
    assert "not the same picture as changed.png" in run("generate", "--from", "changed.png", "-o", "b")[1]


def test_labels_are_drawn_with_the_same_metadata_and_made_again(run, small_class_folder):
    code, out, err = run("generate", "--labels", 3, 0, "-o", "out", "-m", "{var}", "--num-images", 2)
    assert code == 0, err
    names = ["label-3-0.png", "label-3-1.png", "label-0-0.png", "label-0-1.png"]
    assert out.splitlines() == [*(f"out/{name}" for name in names), "all of them: out/grid.png"]
    found = metadata("out/label-0-1.png")
    assert (found["label"], found["prompt"], found["seed"]) == (0, "", 1)
    assert (found["top_k"], found["top_p"], found["guidance_scale"]) == ([900], [0.96], 1.5)
    expected = load_class_pipeline(str(small_class_folder))([0], seed=1)
    np.testing.assert_array_equal(pixels("out/label-0-1.png"), np.asarray(expected.images[0]))
    code, out, err = run("generate", "--from", "out/label-0-1.png", "-o", "again")
    assert (code, "the same picture as out/label-0-1.png" in out) == (0, True), err
    assert metadata("again/label-0-1.png") == found
    start = ["generate", "--labels", 2, "-o", "vary", "-m", "{var}", "--dtype", "bfloat16"]
    assert run(*start, "--init-image", "out/label-3-0.png", "--keep-scales", 2)[0] == 0
    assert metadata("vary/label-2-0.png")["known_mask"] == [1] * 5


def test_labels_and_prompts_go_to_the_models_that_draw_from_them(run):
    labels, out = ["generate", "--labels", 1], ["-o", "out", "-m"]
    assert "small-t2i draws from prompts; use" in the_error(run(*labels, *out, "{t2i}"))
    assert "small-var draws from class labels; use" in the_error(run("generate", "a cat", *out, "{var}"))
    assert "label 5: this model knows 0 to 4" in the_error(run(*labels, 5, *out, "{var}"))
    assert "--compile goes with prompts" in the_error(run(*labels, *out, "{var}", "--compile"))
    assert "label -2: labels count from 0" in the_error(run(*labels, -2, *out, "{var}"))
    assert "give prompts or --labels, not both" in the_error(
        run("generate", "a cat", *labels[1:], *out, "{var}")
    )
    error = the_error(run(*labels, "--negative-prompt", "x", *out, "{var}"))
    assert "--negative-prompt goes with prompts" in error
    assert not list(Path().rglob("*.png"))


def test_info_knows_models_that_draw(run):
    text, classes = run("info", "{t2i}")[1], run("info", "{var}")[1]
    assert "prompts of up to 32 tokens" in text
    assert "2 layers of 32, 260 tokens" in text
    assert "labels, 0 to 4" in classes
    assert "1 layers of 64" in classes
    for said in (text, classes):
        assert "21 of 64 codes" in said
        assert "tokenizer/model.safetensors" in said


def test_a_variation_and_a_repainted_picture_say_what_was_kept(run, small_pipeline_folder):
    ramp = Image.linear_gradient("L").resize((40, 40))
    Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).save("photo.png")
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save("mask.png")
    start = ["generate", "a cat", "-m", "{t2i}", "--init-image", "photo.png"]
    assert run(*start, "-o", "vary", "--keep-scales", 2)[0] == 0
    assert run(*start, "-o", "paint", "--mask", "mask.png")[0] == 0
    pipe = load_pipeline(str(small_pipeline_folder))
    codes = pipe.tokenizer.encode(pipe._pixels(Image.open("photo.png"))).indices[0].tolist()
    vary, paint = metadata("vary/a-cat-0.png"), metadata("paint/a-cat-0.png")
    assert vary["known_codes"] == codes[:5]
    assert vary["known_mask"] == [1] * 5
    assert paint["known_mask"][5:] == [1, 1, 0, 0] * 4
    assert paint["known_codes"] == [c * m for c, m in zip(codes, paint["known_mask"], strict=True)]
    Path("photo.png").unlink()
    for made in ("vary", "paint"):
        assert "the same picture" in run("generate", "--from", f"{made}/a-cat-0.png", "-o", "again")[1]


def test_long_prompts_are_cut_with_a_warning(run):
    words = "dog " * 10_000
    code, _, err = run("generate", words, "a cat", "-o", "out", "-m", "{t2i}", "--steps-per-scale", 1)
    assert code == 0
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("tokenflow: warning: 1 of 2 prompts are cut to 32 tokens")
    (long,) = [path for path in Path("out").iterdir() if path.name.startswith("dog")]
    assert read_drawing(long).prompt == words
    assert len(long.name) < 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts given"),
        (["a cat", " "], "prompt 2 is empty"),
        (["a" * 100_001], "a prompt has 100,001 characters"),
        (["\udce9"], "is not valid UTF-8 text"),
        (["--prompts", "none.txt"], "cannot read prompts none.txt: No such file"),
        (["--prompts", "latin.txt"], "latin.txt: line 2 is not UTF-8; save the file as UTF-8"),
        (["--prompts", "blank.txt"], "blank.txt: no prompt in it"),
        (["a cat", "--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["a cat", "--num-images", "-3"], "--num-images must be at least 1, got -3"),
        (["a cat", "--num-images", "1000000000"], f"at most {MOST_PICTURES:,}"),
        (["a cat", "--num-images", str(10**30)], f"at most {MOST_PICTURES:,}"),
        (["a cat", "--seed", "-1"], "--seed must be from 0"),
        (["a cat", "--guidance-scale", "-1"], "guidance_scale must be a number of at least 0, got -1"),
        (["a cat", "--guidance-scale", "nan"], "guidance_scale must be a number"),
        (["a cat", "--temperature", "-1"], "temperature must be"),
        (["a cat", "--top-k", "-1"], "top_k must be integers from 0"),
        (["a cat", "--top-k"], "--top-k has no numbers; give one a pass"),
        (["a cat", "--top-p"], "--top-p has no numbers"),
        (["a cat", "--top-p", "2"], "top_p must be numbers from 0 to 1"),
        (["a cat", "--top-k", "1", "2", "--top-p", "0.5"], "numbers of passes: --top-k 2, --top-p 1"),
        (["a cat", "--steps-per-scale", "0"], "--steps-per-scale must be at least 1, got 0"),
        (["a cat", "--steps-per-scale", "4"], "4 passes a scale need both --top-k and --top-p"),
        (["a cat", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["a cat", "--keep-scales", "1"], "give --init-image too"),
        (["a cat", "--init-image", "none.png"], "cannot read image none.png: no such file"),
        (["a cat", "--init-image", "p.png", "--keep-scales", "3"], "a variation keeps 1 to 2 scales of 3"),
        (["a cat", "--init-image", "p.png", "--keep-scales", "1", "--mask", "p.png"], "give one of them"),
        (["a cat", "--init-image", "p.png", "--mask", "q.png"], "make them the same size"),
        (["--from", "p.png"], "p.png does not say how it was made"),
        (["--from", "odd.png"], "odd.png: what it says about how it was made is damaged"),
        (["--from", "deep.png"], "deep.png: what it says about how it was made is damaged"),
        (["--from", "none.png"], "cannot read image none.png"),
        (["a cat", "--from", "p.png"], "leave out the PROMPT"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    Path("latin.txt").write_bytes(b"a cat\nun caf\xe9\n")
    Path("blank.txt").write_text("\n \n")
    Image.new("RGB", (8, 8)).save("p.png")
    Image.new("RGB", (9, 8), "white").save("q.png")
    for name, text in (("odd.png", '{"prompt": 1}'), ("deep.png", "[" * 100_000)):
        info = PngInfo()
        info.add_itxt("tokenflow", text)
        Image.new("RGB", (8, 8)).save(name, pnginfo=info)
    before = sorted(Path().iterdir())
    result = run("generate", *arguments, "-o", "out", "-m", "{t2i}")
    assert message in the_error(result)
    assert not [path for path in Path().rglob("*.png") if path not in before]


def test_models_that_cannot_draw_are_explained(run):
    arguments = ["generate", "a cat", "-o", "out", "-m"]
    assert "unknown model 'no-such'" in the_error(run(*arguments, "no-such"))
    assert "has no image tokenizer in tokenizer/" in the_error(run(*arguments, "{model}"))
    assert "cannot use device 'abacus'" in the_error(run(*arguments, "{t2i}", "--device", "abacus"))


def test_too_little_memory_is_one_line(run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("tokenflow.generation.modeling.TokenFlowForTextToImage.stream_indices", full)
    error = the_error(run("generate", "a cat", "-o", "out", "-m", "{t2i}", "--num-images", 4))
    assert "not enough memory for 4 pictures; draw fewer, or lower batch_size (--batch-size)" in error


def test_a_picture_is_never_drawn_over_what_it_was_made_from(run):
    run("generate", "a cat", "-o", "out", "-m", "{t2i}", "--steps-per-scale", 1)
    before = Path("out/a-cat-0.png").read_bytes()
    assert "would overwrite" in the_error(run("generate", "--from", "out/a-cat-0.png", "-o", "out"))
    assert Path("out/a-cat-0.png").read_bytes() == before
    Path("file").write_text("")
    assert "cannot write file" in the_error(run("generate", "a cat", "-o", "file", "-m", "{t2i}"))


def test_passes_are_those_of_table_6():
    def chosen(**options):
        return sampling(GenerateOptions(Path("out"), **options))

    assert chosen() == chosen(steps_per_scale=3) == ((1200, 100, 1), (0.8, 0.8, 0.0))
    assert chosen(steps_per_scale=1) == ((1200,), (0.8,))
    assert chosen(labels=(1,)) == chosen(labels=(1,), steps_per_scale=1) == ((900,), (0.96,))
    assert chosen(labels=(1,), steps_per_scale=3) == chosen()
    assert chosen(top_k=(600,)) == ((600,), (0.8,))
    assert chosen(steps_per_scale=2) == ((1200, 1), (0.8, 0.0))
    assert chosen(top_k=(5, 4, 3, 2), top_p=(0.1, 0.2, 0.3, 0.4)) == ((5, 4, 3, 2), (0.1, 0.2, 0.3, 0.4))
    with pytest.raises(UserError, match="--steps-per-scale 2, --top-k 1"):
        chosen(steps_per_scale=2, top_k=(1,))


def test_a_real_process_says_a_mistake_in_one_line(tmp_path):
    tokenflow = Path(sys.executable).with_name("tokenflow")
    done = subprocess.run(
        [tokenflow, "generate", b"caf\xe9", "-o", tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "is not valid UTF-8 text" in done.stderr
    assert not list(tmp_path.iterdir())
