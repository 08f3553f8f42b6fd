"""`python -m benchmarks`: our code and the obvious formulation, side by side in one process, as ratios."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

Part = Literal["search", "images", "training", "text-to-image", "text-to-image-7b", "understanding"]


@dataclass
class Options:
    """Side-by-side timings of the tokenizer, of text to image and of answers about images."""

    only: tuple[Part, ...] = get_args(Part)
    """the parts to run"""
    threads: int = 2
    """threads of either side"""
    processor_time: bool = False
    """count processor time instead of wall-clock time: use it with one thread where the machine is busy"""
    repeats: int = 5
    """turns of each side; the best counts"""
    output: Path = Path("bench-output/benchmarks.json")
    """where the figures go"""


def main(options: Options) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks import images, measure, search, text_to_image, text_to_image_gpu, training, understanding

    torch.set_num_threads(options.threads)
    if options.processor_time:
        measure.count_processor_time()
    parts = {"search": search.run, "images": images.run, "training": training.run}
    parts |= {"text-to-image": text_to_image.run, "text-to-image-7b": text_to_image_gpu.run}
    parts |= {"understanding": understanding.run}
    console = Console()
    table = Table(title=f"{options.threads} threads, torch {torch.__version__}: ratios, higher is better")
    for column in ("what", "seconds", "ratio", "aim", "seen"):
        table.add_column(column)
    rows = []
    for part in options.only:
        for row in parts[part](options.repeats):
            rows.append(row.as_dict())
            console.print(f"{row.name}: {row.ratio:.2f}x", highlight=False)
            seconds = "\n".join(f"{side} {value:.3f}" for side, value in row.seconds.items())
            aim = "" if row.aim is None else f"{row.aim:.2f}x"
            table.add_row(row.name, seconds, f"{row.ratio:.2f}x", aim, row.note)
    console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine())}
    machine |= {"threads": options.threads, "torch": torch.__version__, "python": platform.python_version()}
    options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options))
