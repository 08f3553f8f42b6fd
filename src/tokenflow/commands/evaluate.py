"""Figures: what `tokenflow eval` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from tokenflow.evaluation.options import GenerationEval, ReconstructionEval, SemanticsEval, VlmEval


def reconstruction(options: OmitArgPrefixes[ReconstructionEval]) -> None:
    """Measure what reconstruction loses: PSNR, SSIM, usage, perceptual distances."""
    from tokenflow.evaluation.reconstruction import run

    _print_result(run(options))


def semantics(options: OmitArgPrefixes[SemanticsEval]) -> None:
    """Measure what tokens know: k-NN, linear probe and zero-shot accuracy."""
    from tokenflow.evaluation.semantics import run

    _print_result(run(options))


def generation(options: OmitArgPrefixes[GenerationEval]) -> None:
    """Measure whether drawn pictures show what was asked for."""
    from tokenflow.evaluation.generation import run

    _print_result(run(options))


def vlm(options: OmitArgPrefixes[VlmEval]) -> None:
    """Measure answers to questions about pictures: your own questions, or the benchmarks of Tab. 3."""
    if options.tasks or options.results is not None:
        from rich.console import Console

        from tokenflow.evaluation import lmms

        console = Console(soft_wrap=True)
        console.width = max(console.width, lmms.WIDTH)
        for part in lmms.table(lmms.run(options)):
            console.print(part)
        return
    from tokenflow.evaluation.vlm import run

    _print_result(run(options))


def compare(results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULT.json ...")]], /) -> None:
    """Show results side by side; those that were measured differently are refused.

    Args:
        results: Files that `eval ... --out` wrote.
    """
    from rich.console import Console

    from tokenflow.evaluation import report

    Console(soft_wrap=True).print(report.compare([report.read(path) for path in results]))


def features(results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULT.json ...")]], /) -> None:
    """Show what chat models know by the features they are shown, beside Tab. 1, 8 and 9 of the paper.

    Args:
        results: Files that `eval vlm --out` wrote on the same questions, one for each kind of features.
    """
    from rich.console import Console

    from tokenflow.evaluation import features as kinds
    from tokenflow.evaluation.report import read

    # A row of Markdown is one line, however narrow the terminal.
    Console(width=1000, soft_wrap=True).print(kinds.compare([read(path) for path in results]))


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console

    from tokenflow.evaluation.report import table

    Console(soft_wrap=True).print(table(result))
