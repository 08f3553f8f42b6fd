"""Training by a recipe, whose values are the options of the command."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from tyro.conf import arg


def by_recipe(recipes: Mapping[str, Callable[[], Any]], start: Callable[[Any], int | None]) -> dict[str, Any]:
    """A command for each recipe that hands it to `start`, with every value of it as an option."""
    return {name: _training(make, start) for name, make in recipes.items()}


def _training(make: Callable[[], Any], start: Callable[[Any], int | None]) -> Callable[..., int | None]:
    recipe = make()

    def train(recipe: Any = recipe) -> int | None:
        return start(recipe)

    train.__doc__ = (make.func if isinstance(make, functools.partial) else make).__doc__
    train.__annotations__["recipe"] = Annotated[type(recipe), arg(name="")]
    return train


def tokenizer(recipe: Any) -> int:
    from tokenflow.training.loop import train_tokenizer

    return _report(train_tokenizer(recipe))


def text_to_image(recipe: Any) -> int:
    from tokenflow.training.text_to_image import train_text_to_image

    return _report(train_text_to_image(recipe))


def understanding(recipe: Any) -> int:
    from tokenflow.training.understanding import train_understanding

    done = train_understanding(recipe)
    if done.skipped:
        what = "conversation" if done.skipped == 1 else "conversations"
        _say_once(f"{done.skipped:,} {what} skipped: {recipe.folder}/skipped.txt says why")
    return _report(done)


def teacher(recipe: Any) -> None:
    from tokenflow.training.teacher import train_teacher

    _say_once(f"the teacher: {train_teacher(recipe)}")


def _report(done: Any) -> int:
    _say_once(f"step {done.step} (stopped by {done.stopped_by}); the model: {done.export}")
    # A stopped run must not look done to `train && eval`; the shell's codes are 130 and 143.
    return 128 + signal.Signals[done.stopped_by] if done.stopped_by in ("SIGINT", "SIGTERM") else 0


def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once a process
        print(text)
