"""What a language model is shown of a picture, compared: one's own figures beside Tab. 1, 8 and 9."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenflow.errors import UserError
from tokenflow.evaluation import report
from tokenflow.evaluation.answers import main_figure

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


class Published(NamedTuple):
    """MME-P, SEED-Bench and TextVQA of the paper, LLaVA-1.5 with Vicuna-13B at 224 px."""

    of: str
    mme_p: float
    seed_bench: float
    text_vqa: float


# Ours, and what it is in the paper. In Tab. 1 semantic and pixel features are tokenizers of their own; ours
# are the two flows of one. Of its pixel tokenizers the best stands here (VQGAN 756.1, VQGAN-LC 744.8).
PUBLISHED = {
    "continuous": Published("CLIP ViT-B/14, Tab. 1", 1460.9, 64.1, 53.4),
    "last": Published("last scale, Tab. 8", 1356.5, 59.9, 49.1),
    "last-semantic": Published("last scale semantic, Tab. 8", 1315.6, 60.1, 49.7),
    "last-pixel": Published("LFQ, Tab. 1", 889.5, 41.1, 46.4),
    "all": Published("full scale, Tab. 8", 1315.1, 59.6, 49.5),
    "all-residual": Published("full scale residual, Tab. 8", 1216.5, 57.0, 48.1),
}
ORDERS = (
    ("Tab. 1: semantic well above pixel", "last-semantic", "last-pixel", "MME-P 1252.4 (VQKD), 889.5 (LFQ)"),
    ("Tab. 1: continuous above semantic", "continuous", "last-semantic", "MME-P 1460.9, 1252.4 (VQKD)"),
    ("Tab. 8: last scale above all scales", "last", "all", "MME-P 1356.5, 1315.1"),
    ("Tab. 8: all scales above residuals", "all", "all-residual", "MME-P 1315.1, 1216.5"),
    ("Tab. 8: both above semantic alone", "last", "last-semantic", "MME-P 1356.5, 1315.6; SEEDB 59.9, 60.1"),
    ("Tab. 9: continuous above discrete", "continuous", "last", "average 58.9, 55.2: 93.7 % are kept"),
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """One order of the paper, and what one's own figures say about it.

    Attributes:
        name, published: the claim, and the paper's figures for it.
        upper, lower: averages of what should stand above, and of what below.
        error: standard error of their difference.
    """

    name: str
    published: str
    upper: float
    lower: float
    error: float

    @property
    def verdict(self) -> str:
        """ "holds" or "does not hold" beyond two standard errors, else "not told apart"."""
        difference = self.upper - self.lower
        if abs(difference) <= 2 * self.error:
            return "not told apart"
        return "holds" if difference > 0 else "does not hold"


def by_features(results: Sequence[report.Result]) -> dict[str, report.Result]:
    """Results of `eval vlm` by what the language model is shown, in the order of `PUBLISHED`.

    Raises:
        UserError: results of another kind, measured differently, without tasks, or two of the same features.
    """
    report.refuse_different(results)
    found: dict[str, report.Result] = {}
    for result in results:
        name, features = result["model"]["name"], result["model"].get("features")
        if features not in PUBLISHED or not tasks_of(result) or "each" not in result:
            raise UserError(f"{name}: needs a result of eval vlm on the files of tokenflow questions")
        if features in found:
            raise UserError(f"{name} and {found[features]['model']['name']} are both shown {features!r}")
        found[features] = result
    return {features: found[features] for features in PUBLISHED if features in found}


def tasks_of(result: report.Result) -> dict[str, dict[str, Any]]:
    """The figures of each task about pictures."""
    return {
        name: figures
        for name, figures in result["metrics"].items()
        if isinstance(figures, dict)
        and not name.startswith("text")
        and ("CIDEr-D" in figures or {"accuracy", "questions"} <= figures.keys())
    }


def average_of(result: report.Result) -> tuple[float, float]:
    """The mean of the tasks' main figures, and its standard error."""
    figures = [main_figure(task) for task in tasks_of(result).values()]
    error = math.hypot(*(error for _, _, error in figures)) / len(figures)
    return statistics.mean(figure for _, figure, _ in figures), error


def orders(results: dict[str, report.Result]) -> list[Order]:
    """The paper's orders of which both sides were measured; errors are paired by question."""
    found = []
    for name, above, below, published in ORDERS:
        if above in results and below in results:
            upper, lower = results[above], results[below]
            error = error_of_difference(upper, lower)
            found.append(Order(name, published, average_of(upper)[0], average_of(lower)[0], error))
    return found


def error_of_difference(one: report.Result, other: report.Result) -> float:
    """Standard error of the difference of two averages of the same questions."""
    errors = []
    for task in tasks_of(one):
        pairs = zip(one["each"][task].split(), other["each"][task].split(), strict=True)
        differences = [float(a) - float(b) for a, b in pairs]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        errors.append(spread / math.sqrt(len(differences)))
    return math.hypot(*errors) / len(errors)


def compare(results: Sequence[report.Result]) -> Group:
    """Figures of each kind of features beside the paper's, and the orders, as Markdown tables.

    Raises:
        UserError: as `by_features`.
    """
    from rich.console import Group

    found = by_features(results)
    return Group(_figures(found), "", _orders(orders(found)))


def _figures(results: dict[str, report.Result]) -> Table:
    tasks = tasks_of(next(iter(results.values())))
    header = ["features"]
    for task, figures in tasks.items():
        header += [f"{task} CIDEr-D"] if "CIDEr-D" in figures else [f"{task} (%)"]
        header += [f"{task} F1", f"{task} says yes"] if "F1" in figures else []
    table = _markdown([*header, "average (%)", "in the paper", "MME-P", "SEEDB", "TQA"])
    for features, result in results.items():
        cells = [features]
        for figures in tasks_of(result).values():
            kind, figure, _ = main_figure(figures)
            cells.append(f"{figure:.3f}" if kind == "CIDEr-D" else _percent(figure))
            if "F1" in figures:
                cells += [_percent(figures["F1"]), _percent(figures["yes share"])]
        average, error = average_of(result)
        paper = PUBLISHED[features]
        cells += [f"{_percent(average)} ± {_percent(error)}", paper.of]
        table.add_row(*cells, f"{paper.mme_p}", f"{paper.seed_bench}", f"{paper.text_vqa}")
    return table


def _orders(found: Sequence[Order]) -> Table:
    table = _markdown(["order", "in the paper", "here: averages (%)", "kept (%)", "difference", "verdict"])
    for order in found:
        averages = f"{_percent(order.upper)}, {_percent(order.lower)}"
        kept = _percent(order.lower / order.upper) if order.upper else "-"
        difference = f"{_percent(order.upper - order.lower)} ± {_percent(order.error)}"
        table.add_row(order.name, order.published, averages, kept, difference, order.verdict)
    return table


def _markdown(header: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    return Table(*header, box=box.MARKDOWN)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
