"""A released text-to-image folder, made of the parity case's weights: converted, loaded, sampled."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from small_model import small_config
from tokenflow import TextToImagePipeline, TokenFlowModel
from tokenflow.checkpoints import released_folder
from tokenflow.checkpoints.safe_load import CheckpointError
from tokenflow.checkpoints.text_to_image import (
    REPORT_FILE,
    _image_tokenizer,
    convert_text_to_image,
    is_text_to_image_folder,
)
from tokenflow.cli import main
from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import ConvSpec, PixelDecoderSpec, PixelFlow, SemanticFlow

PARITY = Path(__file__).parents[1] / "parity"
CASE = json.loads((PARITY / "t2i_tiny/case.json").read_text())
IDS = CASE["ids"]
SCALES = CASE["config"]["scales"]


@pytest.fixture(scope="module")
def goldens():
    """The readers of the parity tests."""
    sys.path.insert(0, str(PARITY))
    yield importlib.import_module("text_to_image_goldens")
    sys.path.remove(str(PARITY))


@pytest.fixture(scope="module")
def image_tokenizer(goldens, tmp_path_factory) -> Path:
    """A small network with the golden codebooks and the released scales."""
    encoder = small_config().flows[0]["encoder"] | {"image_size": 128}
    conv = {"width": 32, "multipliers": (1, 1), "blocks": 1, "latent_channels": 32, "patch": 4}
    flows = [SemanticFlow(encoder=encoder, decoder_layers=1, decoder_heads=2, target_dim=24)]
    model = TokenFlowModel(
        small_config(
            image_size=128,
            scales=SCALES,
            codebook_size=32768,
            flows=[*flows, PixelFlow(encoder=ConvSpec(**conv))],
            pixel_decoder=PixelDecoderSpec(**conv),
        )
    )
    with torch.no_grad():
        books = model.quantizer.quantizer.codebooks
        for name, rows in zip(("semantic", "pixel"), goldens.codes().split([32, 8], dim=1), strict=True):
            books[name].copy_(rows)
    folder = tmp_path_factory.mktemp("image tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(goldens, tmp_path_factory) -> Path:
    """The folder as released: two shards with an index, config, tokenizer with [PAD] and visual tokens
    (only some of them: adding 32,768 takes seconds)."""
    folder = tmp_path_factory.mktemp("released") / "t2i"
    folder.mkdir()
    state = dict(goldens.released_state()) | {"image_token_start": torch.tensor(301)}
    keys = list(state)
    places = {}
    for number, part in enumerate((keys[:9], keys[9:]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copy(PARITY / "t2i_tiny/released_config.json", folder / "config.json")
    tokenizer = Tokenizer.from_file(str(PARITY / "t2i_tiny/tokenizer.json"))
    tokenizer.add_tokens(["[PAD]", *(f"<vq_token_{i}>" for i in range(100))])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(released, image_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, convert_text_to_image(released, out, image_tokenizer)


def copy_with(released: Path, folder: Path, **config) -> Path:
    shutil.copytree(released, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def test_the_report(converted, released):
    out, report = converted
    assert is_text_to_image_folder(released)
    assert not is_text_to_image_folder(out)
    assert (report.layers, report.hidden_size, report.text_tokens, report.codebook_size) == (
        2,
        64,
        301,
        32768,
    )
    assert report.tensors == len(report.renamed) == 31
    assert ("model.pos_1LC", "model.image_position_embedding.weight") in report.renamed
    assert list(report.ignored) == ["image_token_start"]
    assert json.loads((out / REPORT_FILE).read_text())["dropped_rows"] == 32768


def test_every_value_is_in_its_place(converted, goldens):
    """Against the map that the parity tests use, which the goldens check."""
    model = TextToImagePipeline.from_pretrained(converted[0]).model
    expected = goldens.golden_model().state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6 if "code_table" in key else 0)


def test_it_samples_the_golden_codes(converted):
    pipe = TextToImagePipeline.from_pretrained(converted[0])
    infer = CASE["infer"]
    golden = load_file(PARITY / "t2i_tiny/golden_infer_1step.safetensors")
    with pytest.warns(UserWarning, match="cut to 128 tokens"):
        out = pipe(
            infer["prompts"],
            negative_prompt=infer["negative_prompt"],
            guidance_scale=infer["guidance"],
            top_k=[1],
            top_p=[0.0],
        )
    assert torch.equal(out.codes.int(), golden["codes"])
    assert [image.size for image in out.images] == [(128, 128)] * 2
    quantized = pipe.tokenizer.quantized_from_indices(out.codes)
    torch.testing.assert_close(quantized, golden["f_hat"], atol=1e-5, rtol=0)


def test_prompts_cannot_name_visual_tokens(converted):
    pipe = TextToImagePipeline.from_pretrained(converted[0])
    ids, _ = pipe.encode(["a <vq_token_7> in a prompt"])
    assert int(ids.max()) == IDS["pad"]


def test_from_the_command_line(released, image_tokenizer, tmp_path, capsys):
    arguments = ["convert", str(released), str(tmp_path / "out"), "--tokenizer", str(image_tokenizer)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 layers of width 64" in printed
    assert "32,768 embedding rows of visual tokens" in printed
    assert (tmp_path / "out/tokenizer/model.safetensors").is_file()
    assert main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_bin_shards_in_half_precision(released, image_tokenizer, goldens, tmp_path):
    folder = copy_with(released, tmp_path / "bin")
    for file in folder.glob("model*"):
        file.unlink()
    state = {key: tensor.bfloat16() for key, tensor in goldens.released_state().items()}
    torch.save(state, folder / "pytorch_model.bin")
    convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights.pop("code_table.codes").dtype == torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_image_tokenizer_is_looked_for_beside_the_folder(released, tmp_path):
    name = "tokenflow_clipb_32k_enhanced.pt"
    with pytest.raises(UserError, match=rf"{name} is neither in .* nor beside it; name it: --tokenizer FILE"):
        convert_text_to_image(released, tmp_path / "out")
    folder = copy_with(released, tmp_path / "copy")
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=f"{name} is not a checkpoint"):
        convert_text_to_image(folder, tmp_path / "out")


def test_a_released_tokenizer_file(tmp_path):
    """Every tensor of the real layout, all zeros and taking no room on the disk."""
    sys.path.insert(0, str(Path(__file__).parent))
    from test_convert_tokenizer import sparse_file

    file = sparse_file(tmp_path / "released.pt", "clipb_256_enhanced")
    model, report = _image_tokenizer(file, None)
    assert model.config.scales == SCALES
    assert report is not None
    assert report["preset"] == "tokenflow-b-256-enhanced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "lacks 1 tensor: model.norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "has beyond its layout 1 tensor: extra"),
        (lambda s: s.update({"model.pos_1LC": torch.zeros(816, 64)}), r"model.pos_1LC \[816, 64\]"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(33069, 64).long()}), "torch.int64, not"),
    ],
)
def test_other_tensors_are_refused(released, image_tokenizer, goldens, tmp_path, change, message):
    folder = copy_with(released, tmp_path / "copy")
    for file in folder.glob("model*"):
        file.unlink()
    state = dict(goldens.released_state())
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava_qwen"}, "no released text-to-image model"),
        ({"vq_codebook_size": 16384}, "trained with 16,384 codes, the image tokenizer has 32,768"),
        ({"vocab_size": 33070}, r"\[PAD\] has id 300 in the text tokenizer, but 301"),
        ({"vocab_size": None}, "vocab_size is None, not an integer"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_other_configurations_are_refused(released, image_tokenizer, tmp_path, config, message):
    folder = copy_with(released, tmp_path / "copy", **config)
    with pytest.raises(UserError, match=message) as caught:
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_file_names_the_package_that_reads_it(
    released, image_tokenizer, tmp_path, monkeypatch
):
    folder = copy_with(released, tmp_path / "copy")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr(released_folder, "find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r"as tokenizer\.model; to read that: pip install sentencepiece"
    ):
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)


def test_damaged_folders(released, image_tokenizer, tmp_path):
    folder = copy_with(released, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    for wrong, message in (
        ({**places, "lm_head.weight": "../../secret.safetensors"}, "is not a file of this folder"),
        ({**places, "more": "model-00001-of-00002.safetensors"}, "1 tensors of .* are in no file: more"),
        ({**places, "more": "model-3.safetensors"}, "No such file"),
        ("nonsense", "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match=message):
            convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    os.remove(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="has no text tokenizer that can be read"):
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        convert_text_to_image(folder, tmp_path / "out", image_tokenizer)
