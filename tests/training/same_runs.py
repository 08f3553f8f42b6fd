"""Starting two gloo processes by torchrun, and comparing what they leave with what one process leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor


def torchrun(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def check_same_log(one: Path, two: Path) -> None:
    """Two output folders hold the same losses."""

    def log(folder):
        return list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))

    for ours, theirs in zip(log(one), log(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"images_per_second", "conversations_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def check_same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Two state dicts are equal up to rounding."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
