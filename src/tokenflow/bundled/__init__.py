"""The models that ship with the package: one folder each, with config, weights, processor and card."""

from __future__ import annotations

import os
from pathlib import Path

from tokenflow.errors import UserError
from tokenflow.hub import check_model
from tokenflow.names import unknown_name

_HERE = Path(__file__).parent


def bundled_names() -> list[str]:
    """Names of the bundled models, sorted."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/config.json"))


def bundled_path(name: str) -> Path:
    """The folder of a bundled model, such as `"tokenflow-tiny"`.

    Raises:
        UserError: no model of that name ships with the package; the message suggests the nearest one.
    """
    if name not in bundled_names():
        raise unknown_name("bundled model", name, bundled_names())
    return _HERE / name


def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """What `from_pretrained` should load: a bundled model's folder, another folder, or a hub name.

    Raises:
        UserError: it is none of the three: a bare name that is not bundled, such as that of a preset, or a
            path that does not exist; a hub name that was never fetched where the hub does not answer.
    """
    name = os.fspath(name_or_path)
    if name in bundled_names():
        return str(_HERE / name)
    if os.path.exists(name):
        return name
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no model folder at {name}; bundled models: {', '.join(bundled_names())}")
    if "/" in name:  # organisation/model on the hub
        check_model(name)
        return name
    from tokenflow.tokenizer.configuration import PRESETS  # heavy, and needed for this message only

    if name in PRESETS:
        raise UserError(
            f"preset {name!r} has no weights here; make a model of its released checkpoint with "
            "`tokenflow convert FILE FOLDER` and name that FOLDER"
        )
    raise unknown_name("model", name, bundled_names())
