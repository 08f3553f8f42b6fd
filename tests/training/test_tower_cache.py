"""The vision tower's output on disk: what cannot be read is named, and nothing ends for it."""

from __future__ import annotations

import logging

import pytest
from PIL import Image

from small_model import small_chat
from tokenflow.data.conversations import Conversations
from tokenflow.data.sources import Source
from tokenflow.training.tower_cache import TowerCache


@pytest.fixture(scope="module")
def chat(small_model_folder):
    return small_chat(small_model_folder)


def test_an_impossible_name_of_a_picture_is_a_broken_row(chat, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text(r'{"image": "a\u0000.png", "conversations": []}')
    cache = TowerCache(tmp_path / "cache", *chat)
    cache.encode([Conversations(Source(str(file)))], [(0, 0)])
    assert "cannot read image" in cache.broken[0, 0]
    assert "row 0 of" in cache.broken[0, 0]


def test_a_damaged_part_is_left_out_and_made_anew(chat, tmp_path, caplog):
    for colour in ("red", "blue"):
        Image.new("RGB", (36, 40), colour).save(tmp_path / f"{colour}.png")
        row = f'{{"image": "{colour}.png", "conversations": []}}'
        (tmp_path / f"{colour}.jsonl").write_text(row)
        data = [Conversations(Source(str(tmp_path / f"{colour}.jsonl")))]
        cache = TowerCache(tmp_path / "cache", *chat)
        cache.encode(data, [(0, 0)])
    (expected,) = cache(0, 0)
    first, second = sorted(cache.folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    second.write_bytes(second.read_bytes()[:-1])
    sizes = {file: file.stat().st_size for file in (first, second)}
    with caplog.at_level(logging.WARNING):
        again = TowerCache(tmp_path / "cache", *chat)
    assert len(caplog.messages) == 1
    assert str(second) in caplog.text
    assert len(again.places) == 1  # what the other part holds
    again.encode(data, [(0, 0)])
    assert again(0, 0)[0].equal(expected)
    assert {file: file.stat().st_size for file in (first, second)} == sizes
    assert len(list(again.folder.iterdir())) == 3
