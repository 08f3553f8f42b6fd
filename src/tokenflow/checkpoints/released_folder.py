"""Reading the parts of a released language-model folder: configuration, weight files, text tokenizer.

Nothing in the folder is trusted: names in an index stay inside the folder, weights go through `safe_load`, no
code is run.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.checkpoints.safe_load import CheckpointError, read_state_dict

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, one line, if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON ({str(error)[:80]})"
        raise CheckpointError(f"cannot read {file}: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content


def check_text_tokenizer(folder: Path) -> None:
    """Refuse a SentencePiece file that nothing here can read; transformers would ask for tiktoken instead.

    Raises:
        CheckpointError: the only tokenizer is a tokenizer.model, and sentencepiece is not installed.
    """
    slow = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if slow and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder} has its text tokenizer as tokenizer.model; to read that: pip install sentencepiece"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: its files, or those that an index names; safetensors before .bin.

    Raises:
        CheckpointError: no weights, files that are missing, a tensor that is in two of them or in none.
    """
    for stem, suffix in _WEIGHTS:
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _read_indexed(folder, index)
        if files := sorted(folder.glob(f"{stem}*{suffix}")):
            return _read_files(files)
    names = " nor ".join(f"{stem}*{suffix}" for stem, suffix in _WEIGHTS)
    raise CheckpointError(f"{folder} has no weights: neither {names}")


def _read_indexed(folder: Path, index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of file names")
    for name in places.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of this folder")
    weights = _read_files([folder / name for name in sorted(set(places.values()))])
    absent = sorted(places.keys() - weights.keys())
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} tensors of {index.name} are in no file: {absent[0]}")
    return weights


def _read_files(files: list[Path]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in read_state_dict(file)[0].items():
            if key in weights:
                raise CheckpointError(f"{file.parent}: {key} is in two weight files, one of them {file.name}")
            weights[key] = tensor
    return weights
