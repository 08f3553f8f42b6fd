"""Options that several commands share, and how they print tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Dtype = Literal["float32", "bfloat16"]
Output = Annotated[Path, arg(aliases=["-o"])]
Model = Annotated[str, arg(aliases=["-m"])]
Images = Positional[Annotated[tuple[Path, ...], arg(metavar="IMG ...")]]


def print_table(header: list[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, show_header=bool(header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))  # a path is no path without its end
    Console(soft_wrap=True).print(table)
