"""Step zero of `tokenflow-tiny`: the CLIP-style tower that the tokenizer starts from and learns from.

tokenflow train teacher tokenflow-tiny-teacher [overrides]
"""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.training.teacher_recipe import TeacherRecipe


def tokenflow_tiny_teacher() -> TeacherRecipe:
    """CLIPVision 6 x 256, 128 px, patch 16, 5.1 M parameters.

    Command: `tokenflow train teacher tokenflow-tiny-teacher --max-minutes 40`; the figures it reached are in
    docs/training-log.md.
    """
    return TeacherRecipe()


TEACHER_RECIPES: dict[str, Callable[[], TeacherRecipe]] = {"tokenflow-tiny-teacher": tokenflow_tiny_teacher}
