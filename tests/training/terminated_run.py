"""A run in a process group of its own, all of which gets a SIGTERM: as schedulers and terminals do it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def terminated_run(train: Callable[[Any], Any], recipe: Any, folder: Path) -> Any:
    """What `train(recipe)` returned; its group got a SIGTERM after three lines of folder/log.jsonl."""
    process = subprocess.Popen(
        [sys.executable, __file__, folder.with_name("result")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PICKLED": pickle.dumps((train, recipe)).hex(),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    log, said = folder / "log.jsonl", ""
    for line in process.stdout:  # a bar that moves with every second is among them
        said += line
        if log.exists() and log.read_text().count("\n") > 2:
            os.killpg(process.pid, signal.SIGTERM)
            break
    said += process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return pickle.loads(folder.with_name("result").read_bytes())


if __name__ == "__main__":
    train, recipe = pickle.loads(bytes.fromhex(os.environ["PICKLED"]))
    Path(sys.argv[1]).write_bytes(pickle.dumps(train(recipe)))
