"""Recipes: one typed function a training run. They only state values; importing them loads no torch.

tokenflow train tokenizer RECIPE [overrides]
"""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.names import unknown_name
from tokenflow.recipes.ablations import ABLATION_RECIPES
from tokenflow.recipes.tokenizer import TOKENIZER_RECIPES
from tokenflow.training.recipe import TrainRecipe

RECIPES: dict[str, Callable[[], TrainRecipe]] = {**TOKENIZER_RECIPES, **ABLATION_RECIPES}


def recipe(name: str) -> TrainRecipe:
    """The recipe of a name such as `"tokenflow-b-224"`.

    Raises:
        UserError: unknown name; the message suggests the nearest one.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]()


__all__ = ["RECIPES", "recipe"]
