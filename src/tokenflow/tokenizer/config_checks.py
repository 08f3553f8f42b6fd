"""What a configuration may hold: each check raises one line that names the key, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig

from tokenflow.errors import UserError
from tokenflow.names import unknown_name

# As alike as a slip of the fingers; looser would catch keys of transformers that only share a word with ours.
MISSPELT = 0.8


def check_number(name: str, value: Any, low: float, high: float = math.inf, whole: bool = True) -> None:
    """Raise a UserError unless `value` is a number (an integer if `whole`) in [low, high]."""
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    if not good or math.isinf(value):
        wanted = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise UserError(f"{name}: must be {'an integer' if whole else 'a number'} {wanted}, got {value!r}")


def check_scales(scales: Any) -> list[int]:
    """The scales as a list. Raises a UserError unless they are positive integers that rise."""
    values = list(scales) if isinstance(scales, (list, tuple)) else []
    positive = all(isinstance(s, int) and s >= 1 for s in values)
    if not values or not positive or any(a >= b for a, b in pairwise(values)):
        raise UserError(
            f"scales: must be positive and rise, got {scales!r}; give grid sides such as [1, 2, 4, 8]"
        )
    return values


def check_keys(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a UserError, with the nearest known key, if a given one is unknown."""
    known = list(known)
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {what}", key, known)


def check_spelling(what: str, given: Iterable[str], config_class: type[PreTrainedConfig]) -> None:
    """Raise a UserError for keys that are nearly, but not quite, fields of `config_class`.

    Other unknown keys pass, as everywhere in transformers: a newer version of it may have written them.
    """
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(config_class)} - inherited
    for key in given:
        if key in own or hasattr(config_class, key) or key in config_class.attribute_map:
            continue
        near = get_close_matches(key, own, n=1, cutoff=MISSPELT)
        if near:
            raise UserError(f"unknown key of {what} {key!r}; did you mean {near[0]!r}?")
