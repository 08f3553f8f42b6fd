"""A LLaVA of a few thousand random values, and pictures for it."""

from __future__ import annotations

import pytest

from small_model import small_chat


@pytest.fixture
def make_chat(small_model_folder):
    """`make_chat(**options of assemble)` -> a fresh (model, processor)."""

    def make(text: dict | None = None, **options):
        return small_chat(small_model_folder, text, **options)

    return make


@pytest.fixture
def pictures():
    from PIL import Image

    colours = ((200, 30, 30), (20, 160, 60), (40, 40, 220))
    return [Image.new("RGB", (40 + 10 * i, 30), colour) for i, colour in enumerate(colours)]
