"""Results: what they hold, how they are printed and kept, and when two of them may be compared.

A result is a plain dict: `kind`, `metrics` (name -> number or nested dict of numbers), `fingerprint`
(everything that moves the numbers without being the model), `model` (which weights), `command`, `seconds`.
Published figures often fail to reproduce because crop, resize or reference set differ; here such results
are refused instead of compared.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.errors import UserError
from tokenflow.files import atomic_write

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

Result = dict[str, Any]


def model_fingerprint(model: nn.Module, name: str) -> dict[str, Any]:
    """Name, parameter count and the sha256 over every tensor's name, dtype, shape and bytes, in sorted
    order."""
    import torch

    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    parameters = sum(p.numel() for p in model.parameters())
    return {"name": name, "parameters": parameters, "sha256": digest.hexdigest()}


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes. Raises `UserError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def command_line() -> str:
    """The command that runs now, quoted for a shell."""
    program = Path(sys.argv[0]).name
    return shlex.join(["tokenflow" if program in ("tokenflow", "__main__.py") else program, *sys.argv[1:]])


def write(result: Result, path: str | Path) -> None:
    """Write one result as JSON, whole or not at all."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: str | Path) -> Result:
    """Read what `write` wrote. Raises `UserError` when the file is missing or is no result."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a result file: not JSON") from error
    missing = {"kind", "metrics", "fingerprint", "model"} - set(result if isinstance(result, dict) else ())
    if missing:
        raise UserError(f"{path}: not a result file: no {', '.join(sorted(missing))}")
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dict -> (name, value) pairs with names joined by " / "."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name} / ")
        else:
            yield prefix + name, value


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(result: Result) -> Table:
    """One result as a table for a terminal: metrics, then the fingerprint in the caption."""
    return compare([result])


def compare(results: Sequence[Result]) -> Table:
    """Results side by side, one column each. Raises `UserError`, one line that names the differing fields
    with their values, when they were not measured alike."""
    from rich.table import Table

    refuse_different(results)
    grid = Table(
        title=results[0]["kind"], caption=_caption(results[0]["fingerprint"]), caption_justify="left"
    )
    grid.add_column("metric")
    for result in results:
        grid.add_column(result["model"]["name"], justify="right")
    columns = [dict(flatten(result["metrics"])) for result in results]
    for name in dict.fromkeys(name for column in columns for name in column):
        grid.add_row(name, *(_show(column.get(name, "-")) for column in columns))
    return grid


def refuse_different(results: Sequence[Result]) -> None:
    """Raise `UserError` unless all results are of one kind and have equal fingerprints."""
    if not results:
        raise UserError("nothing to compare: give at least one result file")
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    if len(kinds) > 1:
        raise UserError(f"results cannot be compared: they measure different things ({', '.join(kinds)})")
    prints = [dict(flatten(result["fingerprint"])) for result in results]
    differing = []
    for name in dict.fromkeys(name for fields in prints for name in fields):
        values = list(dict.fromkeys(str(fields.get(name, "absent")) for fields in prints))
        if len(values) > 1:
            differing.append(f"{name} ({' / '.join(value[:24] for value in values)})")
    if differing:
        raise UserError(f"results cannot be compared: fingerprints differ in {', '.join(differing)}")


def _caption(fingerprint: Mapping[str, Any]) -> str:
    fields = flatten(fingerprint)
    return ", ".join(f"{name} {str(value)[:12] if 'sha256' in name else value}" for name, value in fields)
