"""encode, decode, reconstruct and info on real files, good and bad, in this process."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import the_error
from tokenflow.bundled import bundled_names, bundled_path
from tokenflow.cli import main
from tokenflow.tokenizer.token_file import load_tokens


def photo(width: int = 48, height: int = 40) -> Image.Image:
    """A smooth colourful picture: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 0 * x + 90], -1)
    return Image.fromarray(array.astype(np.uint8))


@pytest.fixture
def run(small_model_folder, capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; `{model}` is the small model. Gives (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a).replace("{model}", str(small_model_folder)) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


def test_encode_decode_reconstruct_and_info_agree(run, tmp_path):
    photo().save("a.png")
    (tmp_path / "more").mkdir()
    photo(100, 33).save("more/a.jpg")
    photo(20, 60).save("more/b.webp")
    code, out, _ = run("encode", "a.png", "more", "-o", "t.safetensors", "-m", "{model}", "--batch-size", 2)
    assert code == 0
    assert "3 images, 21 tokens each" in out
    tokens = load_tokens("t.safetensors")
    assert tokens.files == ["a.png", "more/a.jpg", "more/b.webp"]
    assert tokens.sizes == [(48, 40), (100, 33), (20, 60)]

    assert run("decode", "t.safetensors", "-o", "decoded")[0] == 0
    assert sorted(p.name for p in Path("decoded").iterdir()) == ["a-2.png", "a.png", "b.png"]
    code, out, _ = run("reconstruct", "a.png", "more", "-o", "rebuilt", "-m", "{model}", "--metrics")
    assert code == 0
    assert "PSNR (dB)" in out
    for name in ("a-2.png", "a.png", "b.png"):
        decoded, rebuilt = Image.open(f"decoded/{name}"), Image.open(f"rebuilt/{name}")
        assert decoded.size == (32, 32)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(rebuilt))
    rows = json.loads(Path("rebuilt/metrics.json").read_text())
    assert [row["file"] for row in rows] == tokens.files
    assert all(0 < row["psnr"] < 60 and -1 <= row["ssim"] <= 1 for row in rows)
    sheet = Image.open("rebuilt/comparison.png")
    assert sheet.size[0] > 6 * 32
    assert sheet.crop((0, 0, sheet.width, 16)).convert("L").getextrema()[0] < 100  # the headings' ink
    assert not leftovers(tmp_path)

    code, out, _ = run("info", "t.safetensors")
    assert "more/b.webp" in out
    code, out, _ = run("info", "{model}")
    assert "32 x 32 px" in out
    assert "1 2 4" in out


def test_fewer_scales_are_coarser_and_bfloat16_is_near(run):
    photo().save("a.png")
    run("encode", "a.png", "-o", "t", "-m", "{model}")
    for name, options in {"full": (), "one": ("--num-scales", 1), "half": ("--dtype", "bfloat16")}.items():
        assert run("decode", "t", "-o", name, *options)[0] == 0
    full, one, half = (np.asarray(Image.open(f"{n}/a.png")).astype(int) for n in ("full", "one", "half"))
    assert (full != one).any()
    assert np.abs(full - half).mean() < 4
    assert "num_scales must be 1 to 3 here, got 9" in the_error(
        run("decode", "t", "-o", "x", "--num-scales", 9)
    )


def test_every_kind_of_picture_is_read(run):
    plain = photo()
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees to see it upright
    clear = plain.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(plain.size))
    deep = (np.asarray(plain.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    plain.transpose(Image.Transpose.ROTATE_90).save("exif.jpg", exif=exif, quality=95)
    plain.convert("CMYK").save("cmyk.jpg", quality=95)
    plain.quantize(16).save("palette.png")
    clear.save("alpha.png")
    Image.fromarray(deep).save("deep.png")
    plain.convert("1").save("bits.png")
    Image.new("RGB", (1, 1), "red").save("one.png")
    names = ["exif.jpg", "cmyk.jpg", "palette.png", "alpha.png", "deep.png", "bits.png", "one.png"]
    assert run("encode", *names, "-o", "t.safetensors", "-m", "{model}")[0] == 0
    tokens = load_tokens("t.safetensors")
    assert tokens.sizes[0] == plain.size  # upright again
    assert tokens.sizes[-1] == (1, 1)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def make_bad(kind: str) -> str:
    photo().save("whole.jpg")
    match kind:
        case "missing":
            return "nothing-here.png"
        case "text":
            Path("text.png").write_text("not an image")
            return "text.png"
        case "empty":
            Path("empty.jpg").touch()
            return "empty.jpg"
        case "truncated":
            data = Path("whole.jpg").read_bytes()
            Path("truncated.jpg").write_bytes(data[: len(data) // 2])
            return "truncated.jpg"
        case "bomb":
            Path("bomb.png").write_bytes(png_header(50_000, 50_000))
            return "bomb.png"
        case _:
            Path("hollow").mkdir()
            return "hollow"


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "truncated", "bomb", "folder without images"])
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_bad_picture_is_one_line_that_names_it(run, tmp_path, kind, command):
    photo().save("good.png")
    bad = make_bad(kind)
    error = the_error(
        run(command, "good.png", bad, "-o", "out.safetensors", "-m", "{model}", "--batch-size", 2)
    )
    assert bad in error
    assert "Traceback" not in error
    assert not Path("out.safetensors").is_file()
    assert not list(tmp_path.glob("out.safetensors/*"))
    assert not leftovers(tmp_path)


def test_decoding_with_the_wrong_model_is_refused(run, other_model_folder):
    photo().save("a.png")
    run("encode", "a.png", "-o", "t.safetensors", "-m", "{model}")
    error = the_error(run("decode", "t.safetensors", "-o", "out", "-m", other_model_folder))
    assert "were made by model" in error
    assert not list(Path("out").iterdir())


def test_a_damaged_token_file_is_refused(run):
    photo().save("a.png")
    run("encode", "a.png", "-o", "t.safetensors", "-m", "{model}")
    Path("t.safetensors").write_bytes(Path("t.safetensors").read_bytes()[:-5])
    assert "t.safetensors: it is damaged" in the_error(run("decode", "t.safetensors", "-o", "out"))
    assert "t.safetensors: it is damaged" in the_error(run("info", "t.safetensors"))
    assert "no such file" in the_error(run("decode", "none", "-o", "out"))


@pytest.mark.parametrize("target", ["a.png/t.safetensors", "/proc/t.safetensors", "folder"])
def test_an_unwritable_output_is_said_before_the_work(run, monkeypatch, target):
    photo().save("a.png")
    Path("folder").mkdir()
    monkeypatch.setattr("tokenflow.codec.load", lambda *_, **__: pytest.fail("worked before looking"))
    assert f"cannot write {target}" in the_error(run("encode", "a.png", "-o", target, "-m", "{model}"))


def test_no_command_overwrites_what_it_reads(run):
    Path("photos").mkdir()
    for name in ("photos/a.png", "photos/comparison.png", "photos/b.jpg"):
        photo().save(name)
    Path("link.png").symlink_to("photos/a.png")
    before = {path: path.read_bytes() for path in Path("photos").iterdir()}
    assert run("encode", "photos", "-o", "t.png", "-m", "{model}")[0] == 0
    before[Path("t.png")] = Path("t.png").read_bytes()
    for target, *arguments in [
        ("photos/b.jpg", "encode", "photos", "-o", "photos/b.jpg", "-m", "{model}"),
        ("link.png", "encode", "photos/a.png", "-o", "link.png", "-m", "{model}"),
        ("photos/a.png", "reconstruct", "photos", "-o", "photos", "-m", "{model}"),
        ("photos/comparison.png", "reconstruct", "photos/comparison.png", "-o", "photos", "-m", "{model}"),
        ("photos/a.png", "decode", "t.png", "-o", "photos"),
    ]:
        assert f"output {target} would overwrite an input file" in the_error(run(*arguments))
    assert {path: path.read_bytes() for path in before} == before


def test_a_full_disk_leaves_no_half_file(run, tmp_path):
    # A limit on the size of files stops the write in its middle, as a full disk does.
    photo().save("a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        encoded = run("encode", "a.png", "-o", "t.safetensors", "-m", "{model}")
        rebuilt = run("reconstruct", "a.png", "-o", "out", "-m", "{model}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write t.safetensors" in the_error(encoded)
    assert f"cannot write {Path('out/a.png')}" in the_error(rebuilt)
    assert not Path("t.safetensors").exists()
    assert not list(Path("out").iterdir())
    assert not leftovers(tmp_path)


def test_a_hub_name_is_looked_up_and_not_taken_for_a_path(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["info", "someone/their-model"], ["decode", "t", "-o", "x", "-m", "someone/their-model"]):
        photo().save("a.png")
        run("encode", "a.png", "-o", "t", "-m", "{model}")
        assert "cannot load model someone/their-model" in the_error(run(*command))


def test_unknown_models_and_other_folders_are_explained(run, tmp_path):
    photo().save("a.png")
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    Path("empty").mkdir()
    for model, message in {
        "no-such-model": "unknown model 'no-such-model'",
        "./nowhere": "no model folder at ./nowhere",
        "llama": "llama is not a tokenflow tokenizer: its config says model_type 'llama'",
        "empty": "empty is not a model: there is no config.json in it",
    }.items():
        assert message in the_error(run("encode", "a.png", "-o", "t", "-m", model))
        assert message in the_error(run("info", model))
    assert "cannot read token file t2.safetensors: no such file" in the_error(run("info", "t2.safetensors"))


def test_info_knows_every_bundled_model(run):
    for name in bundled_names():
        code, out, _ = run("info", name)
        assert code == 0
        assert "M values" in out
        assert str(bundled_path(name)) in "".join(out.split())  # folded where it is long, not cut


def test_a_damaged_model_is_explained(run, small_model_folder):
    photo().save("a.png")
    Path("damaged").mkdir()
    for file in small_model_folder.iterdir():
        data = file.read_bytes()
        Path("damaged", file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    assert "cannot load model damaged" in the_error(run("encode", "a.png", "-o", "t", "-m", "damaged"))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_weights_that_do_not_fit_are_refused(run, small_model_folder, fault):
    photo().save("a.png")
    shutil.copytree(small_model_folder, "mine")
    weights = load_file("mine/model.safetensors")
    key = min(weights)
    weight = weights.pop(key)
    if fault == "unexpected":
        weights |= {key: weight, "surplus.weight": weight.clone()}
        key = "surplus.weight"
    elif fault == "of another shape":
        weights[key] = weight.repeat(2, *[1] * (weight.ndim - 1))
    save_file(weights, "mine/model.safetensors", {"format": "pt"})
    error = the_error(run("encode", "a.png", "-o", "t", "-m", "mine"))
    assert f"the weights of model mine do not fit its config.json: 1 {fault}, first {key}" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encod", "a.png"], "unknown command 'encod'; did you mean 'encode'?"),
        (["encode", "a.png"], "-o"),
        (["encode", "a.png", "-o", "t", "--modle", "x"], "--modle"),
        (["encode", "a.png", "-o", "t", "--batch-size", "many"], "--batch-size"),
        (["encode", "a.png", "-o", "t", "-m", "{model}", "--batch-size", "0"], "at least 1, got 0"),
        (["encode", "a.png", "-o", "t", "-m", "{model}", "--device", "abacus"], "cannot use device 'abacus'"),
        (["encode", "-o", "t"], "no images given"),
        (["reconstruct", "a.png", "--dtype", "int3"], "int3"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, message):
    photo().save("a.png")
    assert message in the_error(run(*arguments))


def test_ctrl_c_in_the_middle_leaves_no_half_file(run, monkeypatch, tmp_path):
    photo().save("a.png")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", interrupted)
    code, _, stderr = run("encode", "a.png", "-o", "t.safetensors", "-m", "{model}")
    assert code == 130
    assert stderr.strip().splitlines()[-1] == "tokenflow: interrupted"
    assert not Path("t.safetensors").exists()
    assert not leftovers(tmp_path)
