"""The vision tower's output on disk: what cannot be read is named, and nothing ends for it."""

from __future__ import annotations

import pytest

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
