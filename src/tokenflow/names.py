"""Unknown names: one line that suggests the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from tokenflow.errors import UserError


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` not among `known`: `unknown preset 'tokenflow-x'; did you mean ...?`."""
    names = {known_name.lower(): known_name for known_name in sorted(known)}
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {names[near[0]]!r}?" if near else f"choose one of {', '.join(names.values())}"
    return UserError(f"unknown {what} {name!r}; {hint}")
