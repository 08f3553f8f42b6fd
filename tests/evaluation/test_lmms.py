"""The field's benchmarks: result files to the row of Tab. 3, and lmms-eval as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from small_model import save_small_chat
from tokenflow.cli import main
from tokenflow.errors import UserError
from tokenflow.evaluation import lmms, report
from tokenflow.evaluation.lmms import BENCHMARKS, average, read_results, tab_3_figures, tasks_of
from tokenflow.evaluation.options import VlmEval
from tokenflow.evaluation.published import COLUMNS, tab_3

QWEN = tab_3()[-1]  # TokenFlow-XL with Qwen-2.5-14B


def test_the_published_averages_come_out():
    whole = [row for row in tab_3() if row.average is not None]
    assert [row.model for row in whole] == [
        "LLaVA-1.5",
        "EMU3",
        *["TokenFlow-" + s for s in ("B", "L", "XL", "XL")],
    ]
    for row in whole:
        assert average(row.figures) == pytest.approx(row.average, abs=0.051)
    assert average({name: value for name, value in QWEN.figures.items() if name != "MME"}) is not None
    for name in set(COLUMNS) - {"MME"}:
        assert average({key: value for key, value in QWEN.figures.items() if key != name}) is None


def test_tab_3_as_published():
    rows = tab_3()
    assert len(rows) == 20
    assert {row.model: row.measured_by_the_authors for row in rows if row.measured_by_the_authors} == {
        "EMU3": ("MME", "MME-P")
    }
    janus = next(row for row in rows if row.model == "Janus")
    assert janus.figures["MMMU"] == 30.5
    assert "TQA" not in janus.figures
    assert set(BENCHMARKS) == set(COLUMNS)


def write_result(folder: Path, task: str, figures: dict, *, model="m", limit=None, name="20261122_080000"):
    """A file as lmms-eval 0.7.3 writes it, as far as it is read; one of its own is in lmms_eval_results/."""
    values = {"alias": task, "samples": 8, **figures}
    values |= {metric.replace(",", "_stderr,"): "N/A" for metric in figures}
    data = {
        "results": {task: values},
        "n-samples": {task: {"original": 8, "effective": 8}},
        "config": {"model": "tokenflow", "limit": limit},
        "versions": {task: 0.0},
        "model_name": model,
    }
    path = folder / model / f"{name}_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def whole_row(tmp_path) -> Path:
    """Results of every task that give the last row of Tab. 3."""
    folder = tmp_path / "results"
    for number, task in enumerate(dict.fromkeys(b.task for b in BENCHMARKS.values())):
        columns = {name: b for name, b in BENCHMARKS.items() if b.task == task and name != "MME"}
        figures = {b.metrics[0]: QWEN.figures[name] / b.scale for name, b in columns.items()}
        if task == "mme":
            figures["mme_cognition_score,none"] = QWEN.figures["MME"] - QWEN.figures["MME-P"]
        write_result(folder, task, figures, name=f"20261122_0800{number:02}")
    return folder


def test_a_file_that_lmms_eval_wrote():
    """Of its model "dummy", which always says yes, on four questions of POPE and eight of MME."""
    results = read_results(Path(__file__).parent / "lmms_eval_results")
    assert [(r.model, r.task, r.questions, r.limit) for r in results] == [
        ("always-yes", "mme", 8, None),
        ("always-yes", "pope", 4, None),
    ]
    assert tab_3_figures(results) == {"POPE": pytest.approx(200 / 3), "MME": 100, "MME-P": 50}


def test_results_become_the_row(whole_row, tmp_path, capsys):
    figures = tab_3_figures(read_results(whole_row))
    assert figures == pytest.approx(QWEN.figures)
    options = VlmEval(model="m", results=str(whole_row), out=str(tmp_path / "row.json"))
    result = lmms.run(options)
    assert result["metrics"]["average"] == pytest.approx(67.36, abs=0.01)
    assert report.read(tmp_path / "row.json") == result
    text = shown(result)
    own = next(line for line in text.splitlines() if line.startswith("m "))
    assert own.split() == ["m", *(f"{QWEN.figures[name]:.1f}" for name in COLUMNS), "67.4"]
    assert "1509.9*" in text
    assert main(["eval", "compare", str(tmp_path / "row.json")]) == 0
    assert "67.36" in capsys.readouterr().out


def shown(result: report.Result) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for part in lmms.table(result):
            console.print(part)
    return capture.get()


def test_a_missing_figure_leaves_no_average(whole_row):
    next(path for path in whole_row.rglob("*.json") if "mmvet" in path.read_text()).unlink()
    result = lmms.run(VlmEval(model="m", results=str(whole_row)))
    assert "average" not in result["metrics"]
    assert shown(result).count("nan") == 0


def test_the_last_result_counts_and_a_judge_may_have_read_mmbench(tmp_path):
    write_result(tmp_path, "pope", {"pope_f1_score,none": 0.5}, name="20261122_080000")
    write_result(tmp_path, "pope", {"pope_f1_score,none": 0.75}, name="20261123_080000")
    write_result(tmp_path, "mmbench_en_dev", {"gpt_eval_score,none": 40.0}, name="20261122_090000")
    assert tab_3_figures(read_results(tmp_path)) == {"POPE": 75.0, "MMB": 40.0}


def test_results_of_another_model_or_limit_do_not_count(tmp_path):
    write_result(tmp_path, "pope", {"pope_f1_score,none": 0.5}, limit=8.0)
    write_result(tmp_path, "gqa", {"exact_match,none": 0.5}, model="other")
    with pytest.raises(UserError, match="no result of m in"):
        lmms.run(VlmEval(model="m", results=str(tmp_path)))
    result = lmms.run(VlmEval(model="m", results=str(tmp_path), limit=8))
    assert result["metrics"] == {"POPE": 50.0}
    assert "Only the first 8 questions" in shown(result)


@pytest.mark.parametrize("text", ["{", "[]", '{"results": {"pope": {}}}', '{"results": {"pope": 3}}'])
def test_damaged_files_are_named(tmp_path, text):
    (tmp_path / "x_results.json").write_text(text)
    with pytest.raises(UserError, match=r"x_results\.json: not a result file of lmms-eval"):
        read_results(tmp_path)


def test_names_of_tasks():
    assert tasks_of(["POPE,seedb", "mme-p", "mme", "vqav2"]) == ["pope", "seedbench", "mme", "vqav2_val"]
    assert len(tasks_of(["all"])) == 11
    assert tasks_of(["mine"], others=True) == ["mine"]
    with pytest.raises(UserError, match=r"unknown benchmark 'popo'; did you mean 'POPE'\?"):
        tasks_of(["popo"])


# ------------------------------------------------------------------------------- lmms-eval as a process
STAND_IN = """#!{python}
# Speaks as the interpreter of `make venv-vlm` does.
import json, os, pathlib, sys
module, words = sys.argv[2], sys.argv[3:]
if module == "tokenflow.evaluation.lmms_data":
    problems = {{"pope": None, "mmvet": None, "broken": None}}
    if os.environ.get("HF_HUB_OFFLINE"):
        problems["gqa"] = "Couldn't reach 'hub/gqa' on the Hub (OfflineModeIsEnabled)"
    print("a word of lmms-eval")
    print(json.dumps({{
        task: {{"dataset": "hub/" + task, "configurations": [], "problem": problems.get(task, "no network")}}
        for task in json.loads(words[0])["tasks"]
    }}))
else:
    given = dict(zip(words[::2], words[1::2]))
    task = given["--tasks"]
    if task == "broken":
        print("\\x1b[31mError during evaluation: out of memory. Please set `--verbosity=DEBUG`\\x1b[0m")
        sys.exit(0)
    print("asking", task, file=sys.stderr)
    model = given["--model_args"].split(",")[0].removeprefix("pretrained=")
    folder = pathlib.Path(given["--output_path"], model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{{task}}_results.json").write_text(json.dumps({{
        "results": {{task: {{"pope_f1_score,none": 0.25, "pope_f1_score_stderr,none": "N/A"}}}},
        "n-samples": {{task: {{"original": 9, "effective": 4.0}}}},
        "config": {{"limit": float(given["--limit"])}},
        "versions": {{task: "Yaml"}}, "model_name": model,
    }}))
"""


@pytest.fixture(autouse=True)
def answering_hub(monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def stand_in(tmp_path) -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_tasks_are_measured_once_and_what_is_missing_is_said(stand_in, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("AZURE_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    command = ["eval", "vlm", "--model", "m", "--vlm-python", stand_in, "--limit", "4"]
    assert main([*command, "--tasks", "pope,gqa", "MMV", "--out", "row.json"]) == 0
    printed = capfd.readouterr()
    assert "asking pope" in printed.err
    assert 'not measured: gqa: no network. Where there is a network: python -c "from' in printed.out
    assert "load_dataset('hub/gqa')\"; then copy $HF_HOME" in printed.out
    assert "1551.1 67.4" in printed.out  # no figure is cut off where the output is no terminal
    assert "not measured: mmvet: an OpenAI model judges the answers: set OPENAI_API_KEY" in printed.out
    result = report.read("row.json")
    assert result["metrics"] == {"POPE": 25.0}
    assert result["fingerprint"] == {"tasks": {"pope": 4}, "versions": {"pope": "Yaml"}, "limit": 4}
    assert set(result["unavailable"]) == {"gqa", "mmvet"}
    assert main([*command, "--tasks", "pope"]) == 0
    assert "asking" not in capfd.readouterr().err


def test_a_task_that_fails_ends_with_its_own_error(stand_in, tmp_path):
    options = VlmEval(tasks=("broken",), include_path=".", vlm_python=stand_in, results=str(tmp_path / "r"))
    with pytest.raises(UserError, match=r"lmms-eval gave no result for broken: out of memory$"):
        lmms.run(options)


def test_nothing_at_all_measured_is_an_error(stand_in, tmp_path):
    options = VlmEval(tasks=("gqa",), vlm_python=stand_in, results=str(tmp_path / "r"))
    with pytest.raises(UserError, match="no benchmark could be measured: gqa: no network"):
        lmms.run(options)


def test_a_silent_hub_is_said_in_place_of_retries(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: "nobody answers")
    options = VlmEval(tasks=("gqa",), vlm_python=stand_in, results=str(tmp_path / "r"))
    with pytest.raises(UserError, match=r"gqa: hub/gqa is not on this machine, and nobody answers\. Where"):
        lmms.run(options)


def test_without_lmms_eval_the_way_to_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lmms, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `make venv-vlm`"):
        lmms.find_python(None)
    with pytest.raises(UserError, match="--vlm-python nowhere: no such file"):
        lmms.find_python("nowhere")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named lmms_eval' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="cannot run lmms-eval: No module named lmms_eval"):
        lmms.unavailable(str(broken), ["pope"], None)


def the_environment() -> str | None:
    try:
        return lmms.find_python(None)
    except UserError:
        return None


PYTHON = the_environment()

OWN_TASK = """
task: own_questions
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lmms-eval: make venv-vlm")
def test_our_model_in_lmms_eval(small_model_folder, tmp_path, monkeypatch, capfd):
    """A task of one's own from a parquet: lmms-eval gets the answers that `ask` gives."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from PIL import Image

    from tokenflow import ask
    from tokenflow.understanding import load

    monkeypatch.chdir(tmp_path)
    chat = save_small_chat(tmp_path / "chat", small_model_folder)
    model, processor = load(chat, device="cpu")
    asked = [
        {"image": Image.effect_noise((40 + 8 * i, 30), 40.0).convert("RGB"), "question": text, "answer": ""}
        for i, text in enumerate(["What is it?", "Is there a dog?\nAnswer yes or no.", "<image> A cat?"])
    ]
    for row in asked:
        row["answer"] = ask(model, processor, row["image"], row["question"], max_new_tokens=6)
    asked.append({**asked[0], "answer": "something else"})
    kinds = Features({"image": ImageColumn(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(asked, features=kinds).to_parquet(tmp_path / "asked.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(OWN_TASK.format(data=tmp_path / "asked.parquet"))
    command = ["eval", "vlm", "--model", "chat", "--tasks", "own_questions", "--include-path", "tasks"]
    command += ["--vlm-python", str(PYTHON)]
    assert main([*command, "--device", "cpu", "--batch-size", "2", "--results", "results"]) == 0
    assert "own_questions: exact_match 0.75" in capfd.readouterr().out


def test_what_cannot_be_asked():
    with pytest.raises(UserError, match="give one of both"):
        lmms.run(VlmEval(data=("x",), tasks=("pope",)))
    own = {"text": True, "instruction": "Be brief.", "max_new_tokens": 8, "answers": "a", "split": "test"}
    for name, value in own.items():
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: for your own questions"):
            lmms.run(VlmEval(tasks=("pope",), **{name: value}))
    with pytest.raises(UserError, match=r"^--split, --text: "):
        lmms.run(VlmEval(tasks=("pope",), text=True, split="test"))
    with pytest.raises(UserError, match="no comma in a model's name"):
        lmms.run(VlmEval(model="a,b", tasks=("pope",)))
    with pytest.raises(UserError, match="--limit must be at least 1"):
        lmms.run(VlmEval(tasks=("pope",), limit=-1))
