"""Word alignment: that the projector learns to see without the language model, alone, and only once."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from small_model import small_language_model, small_words
from tokenflow.errors import UserError
from tokenflow.training.understanding import train_understanding
from tokenflow.training.understanding_models import build_chat
from tokenflow.training.understanding_recipe import (
    ChatModelRecipe,
    StageRecipe,
    UnderstandingRecipe,
    WordAlignmentRecipe,
)
from tokenflow.training.word_alignment import WordAligner, alignment_loss
from tokenflow.understanding import load

COLOURS = ("red", "green", "blue", "gold", "black", "white", "purple", "gray")


def picture(colour: str, noise: np.random.Generator) -> bytes:
    """A picture of one colour with noise, so that none is seen twice."""
    pixels = np.asarray(Image.new("RGB", (32, 32), colour)) + noise.normal(0, 3, (32, 32, 3))
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


@pytest.fixture
def short(recipe) -> UnderstandingRecipe:
    return replace(recipe, words=replace(recipe.words, steps=3))


def other(recipe: UnderstandingRecipe, **changes) -> UnderstandingRecipe:
    return replace(recipe, output_dir=f"{recipe.output_dir}-other", **changes)


def first_line(recipe: UnderstandingRecipe) -> dict:
    return json.loads((Path(recipe.folder) / "log.jsonl").read_text().splitlines()[0])


def projector_of(recipe: UnderstandingRecipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.folder) / "export" / "projector.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_unseen_pictures_find_their_names(recipe):
    train_understanding(recipe)
    line = first_line(recipe)
    assert (line["step"], line["word_names"]) == (0, len(COLOURS))
    assert line["word_top1"] > 0.5  # by chance 0.125
    assert line["word_top5"] > 0.9
    fresh = build_chat(recipe).model.state_dict()
    model, _ = load(Path(recipe.folder) / "export", device="cpu", dtype="float32")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if name.startswith("model.multi_modal_projector.")}


def test_a_run_that_goes_on_takes_what_was_learned(short, monkeypatch):
    train_understanding(short)
    before = first_line(short)
    train_understanding(other(short))
    assert equal(projector_of(short), projector_of(other(short)))  # the same seed
    shutil.rmtree(Path(short.folder) / "checkpoints")  # as if it was killed before the first
    (Path(short.folder) / "export").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(WordAligner, "learn", None)
        train_understanding(short)
    assert equal(projector_of(short), projector_of(other(short)))
    assert first_line(short) == before
    # Another recipe does not take it; a run with a checkpoint asks for nothing more.
    shutil.rmtree(Path(short.folder) / "checkpoints")
    train_understanding(replace(short, seed=1))
    assert not equal(projector_of(short), projector_of(other(short)))
    (Path(short.folder) / "words.safetensors").unlink()
    assert train_understanding(replace(short, align=replace(short.align, steps=2))).step == 2
    assert not (Path(short.folder) / "words.safetensors").exists()


def test_whoever_gives_a_projector_keeps_it(short):
    train_understanding(short)
    train_understanding(other(short, init_from=f"{short.folder}/export", seed=1))
    assert equal(projector_of(short), projector_of(other(short)))


@pytest.mark.parametrize("strategy", ["last", "last-semantic", "last-pixel", "all", "all-residual"])
def test_with_every_choice_of_features_and_without_cache(short, strategy):
    short = replace(short, model=replace(short.model, feature_strategy=strategy))
    train_understanding(short)
    train_understanding(other(short, cache=None))
    assert equal(projector_of(short), projector_of(other(short)))
    assert math.isfinite(first_line(short)["word_loss"])


def test_with_an_ordinary_vision_model(short, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "clip")
    clip = replace(short, model=replace(short.model, tower=str(tmp_path / "clip")), mixed_precision="bf16")
    train_understanding(clip)
    assert first_line(clip)["word_names"] == len(COLOURS)


def test_rows_without_a_picture_are_refused(short, tmp_path):
    pq.write_table(
        pa.Table.from_pylist([row([picture("red", np.random.default_rng(0))] * 2, "two")]),
        tmp_path / "two.parquet",
    )
    stage = replace(short.align, sources=(str(tmp_path / "two.parquet"),))
    with pytest.raises(UserError, match="no conversation has one picture and an answer"):
        train_understanding(replace(short, align=stage))


def test_equal_answers_share_a_target():
    """Two pictures with one answer: the best is a tie between them."""
    features = torch.eye(4)[[0, 0, 1]][:, None].expand(3, 2, 4)
    same, different = torch.eye(4)[[0, 0, 1]], torch.eye(4)[[0, 2, 1]]
    scale = torch.tensor(10.0).log()
    assert alignment_loss(features, same, scale) < alignment_loss(features, different, scale)
    assert alignment_loss(features, same, scale).item() == pytest.approx(math.log(2) * 2 / 3, abs=1e-3)
