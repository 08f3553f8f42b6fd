"""Released understanding folders: what is refused, and where the tower comes from. Values and layout are in
tests/parity/test_understanding_parity.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tokenflow import TokenFlowModel
from tokenflow.checkpoints import understanding
from tokenflow.checkpoints.safe_load import CheckpointError
from tokenflow.checkpoints.understanding import TOWER, convert_understanding, is_released_folder
from tokenflow.errors import UserError

WORDS = Path(__file__).parent.parent / "parity" / "i2t" / "tokenizer_llama.json"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def released(tmp_path) -> Path:
    """A released folder without a tower: config.json, tokenizer, one weight file."""
    folder = tmp_path / "released"
    PreTrainedTokenizerFast(
        tokenizer_file=str(WORDS), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(vocab_size=320, **SIZES)
    about = config.to_dict() | {
        "model_type": "llava_llama",
        "mm_hidden_size": 40,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(about))
    weights = LlamaForCausalLM(config).state_dict()
    for place, shape in (("0", (16, 40)), ("2", (16, 16))):
        weights[f"model.mm_projector.{place}.weight"] = torch.randn(shape)
        weights[f"model.mm_projector.{place}.bias"] = torch.randn(16)
    save_file(weights, folder / "model.safetensors")
    return folder


def change(released: Path, **changes) -> None:
    """Set or (None) drop tensors of the weight file; `__` in a name stands for a dot."""
    weights = load_file(released / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, released / "model.safetensors")


def test_pt_files_convert_too_and_the_report_is_kept(released, small_model_folder, tmp_path):
    torch.save(load_file(released / "model.safetensors"), released / "pytorch_model.bin")
    (released / "model.safetensors").unlink()
    report = convert_understanding(released, tmp_path / "out", tokenizer=small_model_folder)
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["tower"] == report.tower
    assert report.template == "vicuna_v1"
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_index == 320


def test_the_tower_of_the_folder_is_taken_unless_another_is_named(
    released, small_model_folder, other_model_folder, tmp_path, monkeypatch
):
    """The released tower is 2 GB, so a small one stands in behind the tokenizer's own conversion."""
    small = TokenFlowModel.from_pretrained(small_model_folder)
    state = small.state_dict()
    change(released, **{TOWER + key: value for key, value in state.items()})

    def convert_state_dict(found, source):
        assert found.keys() == state.keys()
        report = type("Report", (), {"ignored": {"quantize.codebook_used": "usage statistics"}})
        return small.config, found, report

    monkeypatch.setattr(understanding, "convert_state_dict", convert_state_dict)
    report = convert_understanding(released, tmp_path / "out")
    assert report.tower == f"{released}: {TOWER}*"
    assert report.ignored == {f"{TOWER}quantize.codebook_used": "usage statistics"}
    kept = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").model.vision_tower.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in state.items())

    report = convert_understanding(released, tmp_path / "other", tokenizer=other_model_folder)
    assert set(report.ignored) == {TOWER + key for key in state}
    codes = LlavaForConditionalGeneration.from_pretrained(tmp_path / "other").model.vision_tower.quantizer
    other = TokenFlowModel.from_pretrained(other_model_folder).quantizer
    assert torch.equal(
        codes.state_dict()["quantizer.codebooks.pixel"], other.state_dict()["quantizer.codebooks.pixel"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "lacks 1 tensors, first model.norm.weight"),
        ({"model__mm_projector__2__bias": None}, "lacks 1 tensors, first linear_2.bias"),
        ({"model__surplus": torch.ones(2)}, "holds, beyond its layout, 1 tensors, first model.surplus"),
        ({"lm_head__weight": torch.ones(320, 8)}, "has in another shape 1 tensors, first lm_head.weight"),
        (
            {"model__mm_projector__0__weight": torch.ones(16, 32)},
            "in another shape 1 tensors, first linear_1",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(changes, message, released, small_model_folder, tmp_path):
    change(released, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_understanding(released, tmp_path / "out", tokenizer=small_model_folder)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_converted_are_one_line(released, small_model_folder, tmp_path):
    def refused(message: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=message) as caught:
            convert_understanding(released, tmp_path / "out", tokenizer=small_model_folder)
        assert "\n" not in str(caught.value)

    with pytest.raises(UserError, match=r"holds no vision tower; .* --tokenizer FILE"):
        convert_understanding(released, tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert_understanding(released, released, tokenizer=small_model_folder)
    index = released / "model.safetensors.index.json"
    shards = {"lm_head.weight": "model-2.safetensors", "model.norm.weight": "model.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    refused(r"model-2\.safetensors")
    save_file({"lm_head.weight": torch.ones(1)}, released / "model-2.safetensors")
    refused("lm_head.weight is in two weight files")
    index.unlink()
    refused("lm_head.weight is in two weight files")  # without an index all of the folder's files are read
    (released / "model-2.safetensors").unlink()
    (released / "model.safetensors").unlink()
    refused("has no weights")
    assert is_released_folder(released)
    (released / "config.json").write_text('{"model_type": "llama"}')
    assert not is_released_folder(released)
    refused("its config says model_type 'llama', not llava_qwen or llava_llama")
    (released / "config.json").write_text("[]")
    assert not is_released_folder(released)
    refused(r"config\.json holds no JSON object")
    (released / "config.json").unlink()
    assert not is_released_folder(released)
    refused(r"cannot read .*config\.json: No such file")


def test_a_folder_without_words_is_one_line(released, small_model_folder, tmp_path):
    for file in released.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        convert_understanding(released, tmp_path / "out", tokenizer=small_model_folder)
