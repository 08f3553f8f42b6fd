"""Two gloo processes by torchrun do what one process does on the concatenated batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import log_lines, prepare
from two_processes import plain_recipe, quantizer_steps, sharded_step

from tokenflow.training.loop import train_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where `two_processes.py` has run."""
    folder = prepare(tmp_path_factory.mktemp("two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("two_processes.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TINY_FOLDER": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize(
    "fact",
    [
        "two_processes",
        "both_stopped",
        "parameters_equal",
        "usage_equal",
        "average_equal",
        "adversarial_parameters_equal",
        "quantizer_equal",
        "skipped_everywhere",
        "sharded",
    ],
)
def test_both_processes_agree(folder, fact):
    assert [found[fact] for found in json.loads((folder / "found.json").read_text())] == [True, True]


def test_two_processes_train_as_one_does_on_the_whole_batch(folder):
    recipe = plain_recipe(folder, "one")
    train_tokenizer(recipe)
    one, two = log_lines(recipe), log_lines(plain_recipe(folder, "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    a, b = (load_file(folder / run / "export" / "model.safetensors") for run in ("one", "two"))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-4, msg=name)


def test_kmeans_ema_and_usage_see_the_batches_of_both_processes(folder):
    z = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    one, two = quantizer_steps([z]), load_file(folder / "quantizer.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_fully_sharded_step_equals_the_plain_one(folder):
    plain = sharded_step(plain_recipe(folder, "plain"), shard=False)
    found = json.loads((folder / "found.json").read_text())[0]
    assert found["sharded_loss"] == pytest.approx(plain["loss"].item(), rel=1e-4)
    for name in ("weights", "average"):
        stored = load_file(folder / f"{name}.safetensors")
        assert stored.keys() == plain[name].keys()
        for key, value in plain[name].items():
            torch.testing.assert_close(stored[key], value, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
