"""Tokens on disk: round trip, hostile files, and refusal to decode with another codebook."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from tokenflow import TokenFlowModel, UserError
from tokenflow.tokenizer.token_file import TokenFile, codebook_fingerprint, load_tokens, save_tokens

TOKENS = TokenFile(
    indices=torch.arange(2 * 5).view(2, 5),
    model="tokenflow-tiny",
    fingerprint="ab" * 32,
    codebook_size=64,
    scales=[1, 2],
    image_size=16,
    files=["a.png", "ü b.jpg"],
    sizes=[(640, 480), (1, 1)],
)


def same(a: TokenFile, b: TokenFile) -> bool:
    return torch.equal(a.indices, b.indices) and replace(a, indices=0) == replace(b, indices=0)


@settings(max_examples=20, deadline=None)
@given(
    codes=st.sampled_from([2, 65_536, 65_537, 131_072]),
    scales=st.sampled_from([[1], [1, 2], [4], [1, 2, 3]]),
    images=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_round_trip_keeps_every_index(tmp_path_factory, codes, scales, images, seed):
    length = sum(side * side for side in scales)
    indices = torch.randint(codes, (images, length), generator=torch.Generator().manual_seed(seed))
    if indices.numel():
        indices[0, 0] = codes - 1
    tokens = replace(TOKENS, indices=indices, codebook_size=codes, scales=scales)
    tokens = replace(tokens, files=["x"] * images, sizes=[(3, 4)] * images)
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    save_tokens(path, tokens)
    assert same(load_tokens(path), tokens)


def test_a_token_takes_two_bytes_and_any_safetensors_reader_reads_it(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tokens(path, TOKENS)
    stored = load_file(path)["indices"]
    assert stored.dtype == np.uint16
    assert load_torch(path)["indices"].long().tolist() == TOKENS.indices.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": np.zeros((2, 4), np.uint16)}, r"4 tokens an image, but scales \[1, 2\] have 5"),
        ({"indices": np.full((2, 5), 64, np.uint16)}, "from 64 to 64, outside a codebook of 64"),
        ({"indices": np.full((2, 5), -1, np.int32)}, "from -1 to -1, outside"),
        ({"indices": np.zeros((2, 5), np.float32)}, "indices are float32"),
        ({"indices": np.zeros(10, np.uint16)}, r"indices are uint16 \[10\]"),
        ({"indices": np.zeros((3, 5), np.uint16)}, "3 images, 2 file names and 2 sizes"),
        ({"files": "[]"}, "2 images, 0 file names"),
        ({"scales": "{"}, "damaged or no token file"),
        ({"scales": '"ab"'}, "damaged or no token file"),
        ({"sizes": "[[1]]"}, "damaged or no token file"),
        ({"model": None}, "damaged or no token file"),
        ({"format": "other-9"}, "not a token file of this version"),
    ],
)
def test_files_that_lie_are_refused(tmp_path, changes, message):
    path = tmp_path / "t.safetensors"
    save_tokens(path, TOKENS)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = {**header["__metadata__"], **{k: v for k, v in changes.items() if k != "indices"}}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file({"indices": changes.get("indices", load_file(path)["indices"])}, path, metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_tokens(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_truncated_foreign_and_lying_headers_are_refused(tmp_path):
    whole = tmp_path / "t.safetensors"
    save_tokens(whole, TOKENS)
    data = whole.read_bytes()
    bad = {
        "cut": data[:-3],
        "header cut": data[:40],
        "empty": b"",
        "text": b"not tokens at all",
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "no tokens": None,
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        if content is None:
            save_file({"weight": np.zeros(3)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            load_tokens(path)
    with pytest.raises(UserError, match="no such file"):
        load_tokens(tmp_path / "missing")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokens(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tokens(path, TOKENS)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="no space left"):
        save_tokens(path, TOKENS)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_wrong_model_is_refused_and_a_new_decoder_is_not(small_model_folder, other_model_folder):
    model = TokenFlowModel.from_pretrained(small_model_folder)
    other = TokenFlowModel.from_pretrained(other_model_folder)
    config = model.config
    tokens = replace(
        TOKENS,
        model="mine",
        scales=config.scales,
        codebook_size=config.codebook_size,
        fingerprint=codebook_fingerprint(model),
    )
    tokens.check_model(model, "mine")
    tokens.check_model(model.bfloat16(), "mine")
    torch.nn.init.zeros_(model.pixel_decoder.head.weight)
    tokens.check_model(model, "mine, finer decoder")
    with pytest.raises(UserError, match=r"made by model 'mine' \(codebook .* cannot be decoded with 'other'"):
        tokens.check_model(other, "other")
    with pytest.raises(UserError, match=r"scales \[1, 2, 4\].*scales \[1, 4\]"):
        replace(tokens, scales=[1, 2, 4]).check_model(_with(other, scales=[1, 4]), "other")
    with pytest.raises(UserError, match=r"codebook size 64.*codebook size 32"):
        tokens.check_model(_with(other, scales=[1, 2, 4], codebook_size=32), "other")


def _with(model: TokenFlowModel, **changes) -> TokenFlowModel:
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model
