"""The field's benchmarks by lmms-eval, and the row of Tab. 3 that comes of them.

lmms-eval lives in an environment of its own (`make venv-vlm`): each task is a process there, with our model
plugged in (evaluation/lmms_plugin.py). It writes result files; the table is read from those, and a task with
a result of the same model and limit is not measured again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow import hub
from tokenflow.errors import UserError
from tokenflow.evaluation import report
from tokenflow.evaluation.options import VlmEval
from tokenflow.evaluation.published import COLUMNS, FIRST_DISCRETE, tab_3
from tokenflow.names import unknown_name

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

RESULTS = "vlm-results"
WIDTH = 120  # of the table; in a narrower terminal its lines wrap, since cut figures are worse
CHECKOUT = Path(__file__).parents[3]  # where `make venv-vlm` was said, if this is one
_JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")


@dataclass(frozen=True)
class Benchmark:
    """Where a column of Tab. 3 comes from.

    Attributes:
        task: of lmms-eval.
        metrics: of that task, as "name,filter"; the figure is their sum.
        scale: from lmms-eval's scale to the table's.
        judged: an OpenAI model reads the answers; lmms-eval needs a key for it.
        same_as: another task whose result counts as well.
    """

    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    judged: bool = False
    same_as: str | None = None


BENCHMARKS = {
    "SEEDB": Benchmark("seedbench", ("seed_image,none",)),
    "MMV": Benchmark("mmvet", ("gpt_eval_score,none",), 1.0, judged=True),
    "POPE": Benchmark("pope", ("pope_f1_score,none",)),
    "VQAv2": Benchmark("vqav2_val", ("exact_match,none",)),
    "GQA": Benchmark("gqa", ("exact_match,none",)),
    "TQA": Benchmark("textvqa_val", ("exact_match,none",)),
    "AI2D": Benchmark("ai2d", ("exact_match,flexible-extract",)),
    "RWQA": Benchmark("realworldqa", ("exact_match,none",)),
    "MMMU": Benchmark("mmmu_val", ("mmmu_acc,none",)),
    # Letters are read from the answers by rule; the task that has a judge for the rest counts as well.
    "MMB": Benchmark("mmbench_en_dev_static", ("gpt_eval_score,none",), 1.0, same_as="mmbench_en_dev"),
    "MME": Benchmark("mme", ("mme_perception_score,none", "mme_cognition_score,none"), 1.0),
    "MME-P": Benchmark("mme", ("mme_perception_score,none",), 1.0),
}


# --------------------------------------------------------------------------------------- reading results
def average(figures: dict[str, float]) -> float | None:
    """The average of Tab. 3: MME-P divided by 20 and the other columns but MME; None if one is missing."""
    names = [name for name in COLUMNS if name != "MME"]
    if not set(names) <= set(figures):
        return None
    return sum(figures[name] / (20 if name == "MME-P" else 1) for name in names) / len(names)


@dataclass(frozen=True)
class TaskResult:
    """What lmms-eval measured on one task: figures by "metric,filter", and how many questions it asked.

    Attributes:
        limit: `--limit` of that run; None for a whole benchmark.
        version: of the task. (The version of lmms-eval in its files is that of the git checkout it runs in.)
    """

    model: str
    task: str
    figures: dict[str, float]
    questions: int
    limit: float | None
    version: str


def read_results(folder: str | Path) -> list[TaskResult]:
    """All results in the files that lmms-eval wrote below a folder, in the order of their time.

    Raises:
        UserError: no such folder, or a file that is damaged.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of lmms-eval results")
    found = []
    for path in sorted(Path(folder).rglob("*_results.json"), key=lambda path: path.name):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for task, values in data["results"].items():
                figures = {
                    key: float(value)
                    for key, value in values.items()
                    if "," in key and "_stderr" not in key and isinstance(value, int | float)
                }
                found.append(
                    TaskResult(
                        data["model_name"],
                        task,
                        figures,
                        int(data["n-samples"][task]["effective"]),
                        data["config"]["limit"],
                        str(data["versions"][task]),
                    )
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a result file of lmms-eval: {error!r}") from error
    return found


def tab_3_figures(results: Sequence[TaskResult]) -> dict[str, float]:
    """The columns of Tab. 3 that the results hold, on the table's scale; of equal tasks the last counts."""
    by_task = {result.task: result.figures for result in results}
    figures = {}
    for column, benchmark in BENCHMARKS.items():
        measured = by_task.get(benchmark.task) or by_task.get(benchmark.same_as or "") or {}
        if all(metric in measured for metric in benchmark.metrics):
            figures[column] = benchmark.scale * sum(measured[metric] for metric in benchmark.metrics)
    return figures


# ------------------------------------------------------------------------------------------- measuring
def tasks_of(names: Sequence[str], *, others: bool = False) -> list[str]:
    """Names as the user gives them (`all`, columns of Tab. 3, tasks; commas too) -> tasks of lmms-eval.

    Raises:
        UserError: an unknown name, unless `others` are allowed.
    """
    known = {benchmark.task: benchmark.task for benchmark in BENCHMARKS.values()}
    known |= {column.lower(): benchmark.task for column, benchmark in BENCHMARKS.items()}
    known |= {b.same_as: b.same_as for b in BENCHMARKS.values() if b.same_as}
    tasks: list[str] = []
    for name in [part.strip() for text in names for part in text.split(",") if part.strip()]:
        if name == "all":
            tasks += [benchmark.task for benchmark in BENCHMARKS.values()]
        elif name.lower() in known:
            tasks.append(known[name.lower()])
        elif others:
            tasks.append(name)
        else:
            raise unknown_name("benchmark", name, ["all", *BENCHMARKS])
    return list(dict.fromkeys(tasks))


def find_python(given: str | None) -> str:
    """The interpreter that has lmms-eval: the given one, ours, or that of `make venv-vlm`.

    Raises:
        UserError: there is none; the message says how to make it.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"--vlm-python {given}: no such file")
        return given
    if find_spec("lmms_eval") is not None:
        return sys.executable
    for folder in (CHECKOUT, Path.cwd()):
        python = folder / ".venv-vlm" / "bin" / "python"
        if python.is_file():
            return str(python)
    raise UserError("lmms-eval is not installed: run `make venv-vlm`, or name its python with --vlm-python")


def unavailable(python: str, tasks: Sequence[str], include_path: str | None) -> dict[str, str]:
    """Why tasks cannot be measured here and what would help, one line each; the others are left out."""
    asked = json.dumps({"tasks": list(tasks), "include_path": include_path})
    silent = hub.silence()
    done = subprocess.run(
        [python, "-m", "tokenflow.evaluation.lmms_data", asked],
        capture_output=True,
        text=True,
        env=_environment(silent),
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{python} cannot run lmms-eval: {said}; renew it with `make venv-vlm`")
    lines = {}
    for task, found in json.loads(done.stdout.splitlines()[-1]).items():
        judged = any(benchmark.task == task and benchmark.judged for benchmark in BENCHMARKS.values())
        if found["problem"] is not None:
            lines[task] = found["problem"]
            if found["dataset"] is not None:
                if silent is not None and "OfflineModeIsEnabled" in found["problem"]:
                    lines[task] = f"{found['dataset']} is not on this machine, and {silent}"
                calls = [
                    f"load_dataset({', '.join(map(repr, (found['dataset'], *([name] if name else []))))})"
                    for name in found["configurations"] or [None]
                ]
                lines[task] += (
                    f'. Where there is a network: python -c "from datasets import load_dataset; '
                    f'{"; ".join(calls)}"; then copy $HF_HOME (~/.cache/huggingface) to this machine'
                )
        elif judged and not any(os.environ.get(key) for key in _JUDGE_KEYS):
            lines[task] = f"an OpenAI model judges the answers: set {' or '.join(_JUDGE_KEYS)}"
    return lines


def _environment(silent: str | None) -> dict[str, str]:
    """Of a process of lmms-eval: where the hub is silent, copies of data sets count, without retries."""
    return {**os.environ, **({} if silent is None else {"HF_HUB_OFFLINE": "1"})}


def measure(python: str, task: str, options: VlmEval, results: Path) -> None:
    """Run one task as a process of lmms-eval; what it says goes to standard error.

    Raises:
        UserError: it wrote no result; the message holds its own error.
    """
    arguments = {
        "--model": "tokenflow",
        "--model_args": f"pretrained={options.model},device={options.device},dtype={options.dtype}",
        "--tasks": task,
        "--batch_size": str(options.batch_size),
        "--output_path": str(results),
        "--limit": None if options.limit is None else str(options.limit),
        "--include_path": options.include_path,
    }
    given = [word for name, value in arguments.items() if value is not None for word in (name, value)]
    before = set(results.rglob("*_results.json"))
    tail, decoder = "", getincrementaldecoder("utf-8")("replace")
    process = subprocess.Popen(
        [python, "-m", "lmms_eval", *given, "--log_samples"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=_environment(hub.silence()),
    )
    assert process.stdout is not None
    try:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):  # lines and progress bars as they come
            text = decoder.decode(chunk)
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-20_000:]
        process.wait()
    finally:
        process.terminate()
        process.wait()
    if set(results.rglob("*_results.json")) == before:  # it ends with 0 even where it failed
        said = re.sub(r"\x1b\[[0-9;]*m", "", tail)
        errors = re.findall(r"Error during evaluation: (.*?)\. Please set", said) or said.split("\n")[-2:-1]
        reason = errors[-1][:300] if errors else "it said nothing"
        raise UserError(f"lmms-eval gave no result for {task}: {reason}")


def run(options: VlmEval) -> report.Result:
    """What `tokenflow eval vlm --tasks` does: measure what is not measured yet, and make the row of Tab. 3.

    Returns:
        A result of kind "benchmarks": `metrics` are the columns of Tab. 3, the average where none is missing,
        and the figures of other tasks; under "unavailable" the tasks that could not be measured.

    Raises:
        UserError: unknown tasks, no lmms-eval, a task that failed, or nothing measured at all.
    """
    started = time.perf_counter()
    own = ("data", "split", "text", "instruction", "max_new_tokens", "answers")
    given = [
        f"--{name.replace('_', '-')}" for name in own if getattr(options, name) != getattr(VlmEval, name)
    ]
    if given:
        raise UserError(
            f"{', '.join(given)}: for your own questions, and --tasks and --results for benchmarks: "
            "give one of both"
        )
    if "," in options.model:
        raise UserError(f"lmms-eval takes no comma in a model's name, as in {options.model}")
    if min(options.batch_size, 1 if options.limit is None else options.limit) < 1:
        raise UserError("--batch-size and --limit must be at least 1")
    results = Path(options.results or RESULTS)
    tasks = tasks_of(options.tasks, others=options.include_path is not None)
    have = {result.task for result in _of_this_run(options, results)}
    wanted = [task for task in tasks if task not in have]
    missing: dict[str, str] = {}
    if wanted:
        python = find_python(options.vlm_python)
        missing = unavailable(python, wanted, options.include_path)
        for task in wanted:
            if task not in missing:
                measure(python, task, options, results)
    measured = [result for result in _of_this_run(options, results) if not tasks or result.task in tasks]
    if not measured:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in missing.items())
        raise UserError(
            f"no benchmark could be measured: {reasons or f'no result of {options.model} in {results}'}"
        )
    figures: dict[str, Any] = tab_3_figures(measured)
    mean = average(figures)
    others = [
        r for r in measured if r.task not in {t for b in BENCHMARKS.values() for t in (b.task, b.same_as)}
    ]
    metrics = {**figures, **({} if mean is None else {"average": mean})}
    metrics |= {other.task: other.figures for other in others}
    result = {
        "kind": "benchmarks",
        "metrics": metrics,
        "fingerprint": {
            "tasks": {result.task: result.questions for result in measured},
            "versions": {result.task: result.version for result in measured},
            "limit": options.limit,
        },
        "model": {"name": options.model},
        "unavailable": missing,
        "seconds": round(time.perf_counter() - started, 1),
        "command": report.command_line(),
    }
    if options.out is not None:
        report.write(result, options.out)
    return result


def _of_this_run(options: VlmEval, results: Path) -> list[TaskResult]:
    found = read_results(results) if results.is_dir() or not options.tasks else []
    return [r for r in found if r.model == options.model and r.limit == options.limit]


# ----------------------------------------------------------------------------------------------- the table
def table(result: report.Result) -> list[Table | Text]:
    """The row of Tab. 3 below the published ones, figures of other tasks, and what could not be measured."""
    from rich.table import Table
    from rich.text import Text

    metrics, limit = result["metrics"], result["fingerprint"]["limit"]
    own = {column: metrics[column] for column in COLUMNS if column in metrics}
    grid = Table(title="Tab. 3, and this model", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("model", no_wrap=True)
    grid.add_column("language model", no_wrap=True)
    for name in ("Res.", *COLUMNS, "Avg."):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_row(Text("continuous visual input", style="dim italic"))
    for row in tab_3():
        if row.model == FIRST_DISCRETE:
            grid.add_row(Text("discrete visual input", style="dim italic"))
        cells = _cells(row.figures, row.average, row.measured_by_the_authors)
        grid.add_row(row.model, row.language_model, row.resolution, *cells)
    name = result["model"]["name"].rstrip("/").rpartition("/")[2]
    grid.add_row(Text("measured here", style="dim italic"))
    grid.add_row(Text(name), "", "", *_cells(own, metrics.get("average")), style="bold")
    lines = [f"{task}: {_plain(values)}" for task, values in metrics.items() if isinstance(values, dict)]
    if limit is not None:
        lines.append(f"Only the first {limit} questions of each task: to try things out, not to compare.")
    lines += [f"not measured: {task}: {reason}" for task, reason in result["unavailable"].items()]
    if own:
        lines.append("Avg.: with MME-P / 20, without MME. *: not in the original paper, measured for Tab. 3.")
    return [*([grid] if own else []), *map(Text, lines)]


def _cells(figures: dict[str, float], mean: float | None, starred: Sequence[str] = ()) -> list[str]:
    shown = [f"{figures[name]:.1f}{'*' * (name in starred)}" if name in figures else "-" for name in COLUMNS]
    return [*shown, "-" if mean is None else f"{mean:.1f}"]


def _plain(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix(',none')} {value:.4g}" for name, value in figures.items())
