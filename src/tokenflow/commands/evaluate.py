"""Figures: what `tokenflow eval` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tokenflow.evaluation.options import GenerationEval, ReconstructionEval, SemanticsEval, VlmEval


def reconstruction(options: Annotated[ReconstructionEval, arg(name="")]) -> None:
    """Measure what reconstruction loses: PSNR, SSIM, usage, perceptual distances.

    The JSON result carries a fingerprint of data and preprocessing; only equal fingerprints can be compared.

    Example: `tokenflow eval reconstruction --data PACKS/flickr8k --out result.json`
    """
    from tokenflow.evaluation.reconstruction import run

    _print_result(run(options))


def semantics(options: Annotated[SemanticsEval, arg(name="")]) -> None:
    """Measure what tokens know: k-NN, linear probe and zero-shot accuracy.

    Of the mean-pooled quantized features (semantic flow, pixel flow, both) beside the continuous teacher's,
    and zero-shot through the semantic decoder. Learns from one split of a labelled set, reports on another.

    Example: `tokenflow eval semantics --data PACKS/tiny_imagenet --teacher TEACHER --out result.json`
    """
    from tokenflow.evaluation.semantics import run

    _print_result(run(options))


def generation(options: Annotated[GenerationEval, arg(name="")]) -> None:
    """Measure whether drawn pictures show what was asked for.

    Draws a picture for each row of a set: agreement with an independent classifier, similarity to the prompt,
    a Frechet distance to the real pictures; and, with `--ablation`, the sampling strategies of Tab. 6 side by
    side on the same seeds.

    Example: `tokenflow eval generation --data PACKS/flowers102 --classifier FILE.pth --out result.json`
    """
    from tokenflow.evaluation.generation import run

    _print_result(run(options))


def vlm(options: Annotated[VlmEval, arg(name="")]) -> None:
    """Measure answers to questions about pictures: your own questions, or the benchmarks of Tab. 3.

    Yes/no questions as POPE does (accuracy, F1), captions by CIDEr-D, all others as GQA does (exact match).
    Or, with `--tasks`, the field's benchmarks through lmms-eval, as a row of Tab. 3 below the published ones.

    Example: `tokenflow eval vlm --data questions/*-val.parquet --text --out result.json`

    Example: `tokenflow eval vlm --model MODEL --tasks all --results results`
    """
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
