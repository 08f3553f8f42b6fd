"""The examples of README.md and docs/ are run as a reader would run them, in order, page by page.

A block that cannot run here (hours, GPUs, files that the reader has) carries a comment in the page,
`<!-- test: not run (WHY); counterpart PATH -->`, with the test that covers the same call with a stand-in.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokenflow import cli
from tokenflow.demo import SAMPLES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- test: not run \((.+?)\); counterpart (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    counterpart: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, code, counterpart or None) for _, counterpart, language, code in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path):
    for name in ("photos", "more-photos"):
        (tmp_path / name).mkdir()
    for sample in sorted(SAMPLES.glob("*.jpg")):
        shutil.copy(sample, tmp_path / "photos")
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "more-photos")
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "photo.jpg")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    # One script a page: what a reader has after one block is there in the next.
    python = [b.code for b in blocks(page) if b.language == "python" and not b.counterpart]
    shell = [b.code for b in blocks(page) if b.language == "bash" and not b.counterpart]
    for command, code in (([sys.executable, "-c"], python), (["bash", "-euxc"], shell)):
        if code:
            done = subprocess.run(
                [*command, "\n".join(code)],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_do_not_run_have_a_counterpart(page):
    for block in blocks(page):
        assert block.language in ("python", "bash", ""), f"{page.name}: a block in {block.language!r}"
        if block.counterpart:
            assert (ROOT / block.counterpart).is_file(), f"{page.name}: no {block.counterpart}"


# Our own commands are written down, with variables as the shell fills them in; no other is started.
WRITTEN_DOWN = """
PATH=
tokenflow() { printf '%q ' "$@"; echo; }
torchrun() { while [ "$1" != tokenflow ]; do shift; done; "$@"; }
"""
IN_DOCSTRINGS = re.compile(r"^ +((?:tokenflow|torchrun) (?:.*\\\n)*.*)$", re.M)


def shell_blocks_not_run() -> dict[str, str]:
    found = {p.stem: [b.code for b in blocks(p) if b.language == "bash" and b.counterpart] for p in PAGES}
    for words, recipes in cli.COMMANDS["train"].items():
        found |= {f"{words} {name}": IN_DOCSTRINGS.findall(train.__doc__) for name, train in recipes.items()}
    return {name: "\n".join(codes) for name, codes in found.items() if codes}


@pytest.mark.parametrize("name", shell_blocks_not_run())
def test_commands_that_are_not_run_can_be_read(name, tmp_path, monkeypatch, capsys):
    script = WRITTEN_DOWN + shell_blocks_not_run()[name]
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    read = cli._parse
    monkeypatch.setattr(cli, "_parse", lambda *arguments: (read(*arguments), lambda: 0)[1])
    for line in done.stdout.splitlines():
        assert cli.main(shlex.split(line)) == 0, line + capsys.readouterr().err


def test_ci_walks_the_path_that_the_readme_shows():
    steps = (ROOT / ".ci" / "run").read_text()
    shown = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert {"demo", "test"} <= set(shown)
    assert all(f"make {target}" in steps for target in ("lint", "demo", "test"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
