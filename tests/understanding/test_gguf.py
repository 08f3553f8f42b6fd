"""Language models out of GGUF files, and their unpacked copies in the cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tokenflow.errors import UserError
from tokenflow.understanding import gguf
from tokenflow.understanding.gguf import cache_folder, load_gguf

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "Ġc"]
TEXT = "<|im_start|>ab c<|im_end|>"


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A Llama of one layer as llama.cpp writes it, quantized to 4 bits; the cache is the test's own."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "words.gguf")


def write_gguf(path: Path) -> Path:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer, random = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    matrices = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {**matrices, "token_embd.weight": (len(WORDS), 32)}.items():
        values = random.standard_normal(shape).astype(np.float32)
        kind = GGMLQuantizationType.Q4_1
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.standard_normal(32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def count_unpacked(monkeypatch) -> list[Path]:
    unpack, unpacked = gguf._unpack, []
    monkeypatch.setattr(gguf, "_unpack", lambda path: (unpacked.append(path), unpack(path))[1])
    return unpacked


def test_what_the_cache_gives_is_what_the_file_holds(file, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    expected = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(**where)
    unpacked = count_unpacked(monkeypatch)
    for _ in range(2):
        model, tokenizer = load_gguf(file)
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert tokenizer(TEXT).input_ids == words(TEXT).input_ids == [1, 12, 13, 2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert unpacked == [file]


def test_the_model_is_no_longer_a_quantized_one(file, tmp_path):
    for _ in range(2):  # unpacked, then out of the cache
        model, tokenizer = load_gguf(file, torch.bfloat16)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        model.float().save_pretrained(tmp_path / "saved")
    model(**tokenizer(TEXT, return_tensors="pt")).logits.sum().backward()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert not torch.equal(load_gguf(file)[0].lm_head.weight, model.lm_head.weight)  # the cache is untouched


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("left", [None, 40])
def test_a_damaged_cache_is_made_anew(file, monkeypatch, damaged, left):
    expected = load_gguf(file)[0].lm_head.weight
    part = cache_folder(file) / damaged
    if left is None:
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:left])
    unpacked = count_unpacked(monkeypatch)
    for _ in range(2):
        model, tokenizer = load_gguf(file)
        assert torch.equal(model.lm_head.weight, expected)
        assert tokenizer(TEXT).input_ids == [1, 12, 13, 2]
    assert unpacked == [file]


def test_another_file_of_the_same_name_has_its_own_copy(file, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_gguf(tmp_path / "other" / file.name)
    assert cache_folder(other) == cache_folder(file)  # the content counts, not the place
    with other.open("ab") as content:
        content.write(b"0")
    assert cache_folder(other) != cache_folder(file)


def test_without_a_place_for_the_copy_it_works_and_warns(file, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match=r"cannot write .*is unpacked at every start"):
        model, tokenizer = load_gguf(file)
    assert model(**tokenizer(TEXT, return_tensors="pt")).logits.isfinite().all()


def test_files_that_cannot_be_read_are_one_line(file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^cannot read .*none\.gguf: No such file"):
        load_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match=r"text\.gguf is no language model: "):
        load_gguf(tmp_path / "text.gguf")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(UserError, match=r"reading words\.gguf needs gguf: pip install '.*\[chat\]'"):
        load_gguf(file)
