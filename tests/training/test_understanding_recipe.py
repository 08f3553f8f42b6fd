"""Values of a recipe for chat models that training would stumble over."""

from __future__ import annotations

import pytest

from tokenflow.errors import UserError
from tokenflow.training.understanding_recipe import LoraRecipe, StageRecipe, UnderstandingRecipe


@pytest.mark.parametrize(
    ("kind", "name", "value", "must_be"),
    [
        (UnderstandingRecipe, "seed", -1, r"from 0 to 2\*\*32 - 1"),
        (UnderstandingRecipe, "seed", 2**40, r"from 0 to 2\*\*32 - 1"),
        (UnderstandingRecipe, "warmup", 2.0, "from 0 to 1"),
        (UnderstandingRecipe, "warmup", -1.0, "from 0 to 1"),
        (UnderstandingRecipe, "weight_decay", float("nan"), "finite and at least 0"),
        (UnderstandingRecipe, "clip", 0.0, "above 0"),
        (UnderstandingRecipe, "max_minutes", -1.0, "finite and at least 0"),
        (UnderstandingRecipe, "eval_rows", 0, "at least 1"),
        (UnderstandingRecipe, "max_length", 0, "at least 1"),
        (UnderstandingRecipe, "num_workers", -1, "finite and at least 0"),
        (StageRecipe, "lr", float("nan"), "finite and at least 0"),
        (StageRecipe, "lr", -1.0, "finite and at least 0"),
        (StageRecipe, "epochs", float("nan"), "finite and above 0"),
        (StageRecipe, "epochs", 0.0, "finite and above 0"),
        (LoraRecipe, "alpha", float("nan"), "finite and above 0"),
        (LoraRecipe, "rank", -1, "finite and at least 0"),
        (LoraRecipe, "lr", float("inf"), "finite and at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_run(kind, name, value, must_be):
    with pytest.raises(UserError, match=f"^{name}={value} must be {must_be}$"):
        kind(**{name: value})


def test_edges_of_the_ranges():
    UnderstandingRecipe(seed=2**32 - 1, max_minutes=0.0, warmup=1.0, clip=float("inf"), trackers=("none",))
    StageRecipe(lr=0.0, epochs=0.01)
    LoraRecipe(keep=0.0)


def test_unknown_trackers_are_refused():
    with pytest.raises(UserError, match=r"^unknown tracker 'tensorbord'; did you mean 'tensorboard'\?$"):
        UnderstandingRecipe(trackers=("tensorbord",))
    with pytest.raises(UserError, match=r"^unknown tracker 'nope'; "):
        UnderstandingRecipe(trackers=("wandb", "nope"))
