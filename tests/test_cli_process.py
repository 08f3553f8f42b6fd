"""The command line as real processes: start-up without heavy imports, exit codes, Ctrl-C in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from tokenflow.cli import EXTRAS

TOKENFLOW = Path(sys.executable).with_name("tokenflow")

# Every --help in one process: whatever one of them imports heavily is seen at the end of that one.
HELPS = """
import contextlib, io, sys
from tokenflow.cli import COMMANDS, main

def leaves(commands, words):
    yield words
    if isinstance(commands, dict):
        for word, inner in commands.items():
            yield from leaves(inner, [*words, word])

count = 0
for words in leaves(COMMANDS, []):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*words, "--help"]) == 0
    assert out.getvalue().startswith("usage: tokenflow"), out.getvalue()
    assert "options options" not in out.getvalue(), words
    heavy = {"torch", "transformers", "numpy", "PIL", "datasets", "accelerate"} & set(sys.modules)
    assert not heavy, (words, heavy)
    count += 1
print(count)
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_no_help_imports_torch_or_transformers():
    done = run(sys.executable, "-c", HELPS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_installed_command_answers():
    done = run(TOKENFLOW, "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "tokenflow")
    assert "reconstruct" in run(TOKENFLOW).stdout
    assert run(sys.executable, "-m", "tokenflow", "--help").stdout.startswith("usage: tokenflow COMMAND")


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2():
    done = run(TOKENFLOW, "recontruct", "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tokenflow: error: unknown command 'recontruct'; did you mean 'reconstruct'?\n"
    done = run(TOKENFLOW, "train", "tokenizer", "tokenflow-tyni")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "tokenflow: error: unknown recipe 'tokenflow-tyni'; did you mean 'tokenflow-tiny'?\n"
    )


def test_extras_bring_the_packages_that_errors_name_them_for():
    project = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        name = {"sklearn": "scikit-learn"}.get(package, package)
        assert any(line.startswith(name) for line in extras[extra]), f"{extra} does not bring {package}"


def test_a_reader_that_leaves_early_is_no_error():
    with subprocess.Popen(
        [TOKENFLOW, "train", "tokenizer"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as p:
        assert p.stdout is not None
        p.stdout.close()
        assert p.stderr is not None
        assert p.stderr.read() == b""
        assert p.wait() == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes to hold the process in its middle")
def test_ctrl_c_in_the_middle_leaves_whole_files_only(tmp_path, small_model_folder):
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "first.png")
    outputs = {"encode": tmp_path / "tokens.safetensors", "reconstruct": tmp_path / "pictures"}
    running = {}
    for command, output in outputs.items():
        # The second image is a pipe: the process waits there, in the middle of its work, until it is stopped.
        pipe = tmp_path / f"{command}.png"
        os.mkfifo(pipe)
        arguments = [tmp_path / "first.png", pipe, "-o", output, "-m", small_model_folder, "--batch-size", 1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running[command] = subprocess.Popen(
            [TOKENFLOW, command, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A shell starts its background jobs with Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    for command, process in running.items():
        with open(tmp_path / f"{command}.png", "wb"):  # opens when the process has come this far
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        assert process.returncode == 130, stderr
        assert stderr.strip().splitlines()[-1] == "tokenflow: interrupted"
        assert "Traceback" not in stderr
    assert not outputs["encode"].exists()
    assert [path.name for path in outputs["reconstruct"].iterdir()] == ["first.png"]
    Image.open(outputs["reconstruct"] / "first.png").load()
    assert not list(tmp_path.glob(".*"))
