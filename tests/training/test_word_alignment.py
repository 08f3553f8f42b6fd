"""Word alignment: that the projector learns to see without the language model, alone, and only once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from small_model import small_language_model, small_words
from tokenflow.training.understanding import train_understanding
from tokenflow.training.understanding_models import build_chat
from tokenflow.training.understanding_recipe import (
    ChatModelRecipe,
    StageRecipe,
    UnderstandingRecipe,
    WordAlignmentRecipe,
)
from tokenflow.understanding import load

COLOURS = ("red", "green", "blue", "gold", "black", "white", "purple", "gray")
PROJECTOR = "model.multi_modal_projector."


def picture(colour: str, noise: np.random.Generator) -> bytes:
    """A picture of one colour with noise, so that none is seen twice."""
    pixels = np.asarray(Image.new("RGB", (32, 32), colour)) + noise.normal(0, 8, (32, 32, 3))
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def row(images: list[bytes], answer: str) -> dict:
    question = {"from": "human", "value": "<image>\n" * len(images) + "What?"}
    turns = [question, {"from": "gpt", "value": answer}, {"from": "human", "value": "And?"}]
    later = {"from": "gpt", "value": "something else"}
    return {"images": [{"bytes": b, "path": None} for b in images], "conversations": [*turns, later]}


@pytest.fixture(scope="module")
def recipe_of_module(small_model_folder, tmp_path_factory) -> UnderstandingRecipe:
    folder, noise = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    small_language_model().save_pretrained(folder / "text")
    small_words().save_pretrained(folder / "text")
    rows = [row([picture(colour, noise)], f"{colour}.") for _ in range(60) for colour in COLOURS]
    rows += [row([], "nothing"), row([picture("red", noise)] * 2, "two"), row([b"broken"], "broken")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return UnderstandingRecipe(
        model=ChatModelRecipe(str(small_model_folder), "last", str(folder / "text"), "smollm2"),
        align=StageRecipe((str(folder / "train.parquet"),), template="plain", batch_size=2, steps=1, lr=0.0),
        words=WordAlignmentRecipe(steps=150, lr=1e-2, batch_size=32),
        mixed_precision="no",
        cache=str(folder / "cache"),
        trackers=(),
    )


@pytest.fixture
def recipe(recipe_of_module, tmp_path) -> UnderstandingRecipe:
    return replace(recipe_of_module, output_dir=str(tmp_path / "run"))


def few_steps(recipe: UnderstandingRecipe, **changes) -> UnderstandingRecipe:
    return replace(recipe, words=replace(recipe.words, steps=2, **changes))


def log_of(recipe: UnderstandingRecipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.folder) / "log.jsonl").read_text().splitlines()]


def weights_of(recipe: UnderstandingRecipe) -> dict[str, torch.Tensor]:
    return load(Path(recipe.folder) / "export", device="cpu", dtype="float32")[0].state_dict()


def test_unseen_pictures_find_their_names(recipe):
    train_understanding(recipe)
    first = log_of(recipe)[0]
    assert first["step"] == 0
    assert first["word_names"] == len(COLOURS) == 8
    assert first["word_top1"] > 0.6  # by chance 0.125
    assert first["word_top5"] >= first["word_top1"]
    fresh, learned = build_chat(recipe).model.state_dict(), weights_of(recipe)
    moved = {name for name, tensor in learned.items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if name.startswith(PROJECTOR)}
