"""What a training run tells and hears: the log file, the learning rate, requests to stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tokenflow.training.recipe import TrainRecipe


def lr_factor(step: int, recipe: TrainRecipe, seconds: float = 0.0) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the full rate.

    Args:
        seconds: that the run has taken so far, for a cosine over `recipe.max_minutes`.
    """
    o = recipe.optimizer
    warmup = min(1.0, (step + 1) / (o.warmup_steps + 1))
    if o.schedule == "cosine-minutes":  # the warm-up takes no part: nobody knows its seconds beforehand
        return warmup * cosine(seconds / (60 * (recipe.max_minutes or math.inf)), o.final_lr)
    if warmup < 1.0 or o.schedule == "constant":
        return warmup
    return cosine((step - o.warmup_steps) / max(1, recipe.steps - o.warmup_steps), o.final_lr)


def cosine(progress: float, final: float) -> float:
    """From 1 at progress 0 to `final` at progress 1 and beyond."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


# What may change from one invocation of a run to the next without another course of the training.
FREE_FIELDS = {"steps", "max_minutes", "output_dir", "keep", "trackers", "cache"}
FREE_FIELDS |= {"num_workers", "data.num_workers"}


def recipe_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, as "optimizer.lr 0.001 -> 0.0005", but for those that may change freely.

    Args:
        before: a recipe as recipe.json holds it.
        now: a recipe as a dict.
    """
    changes = []
    for key, value in json.loads(json.dumps(now)).items():  # tuples become lists, as in the file
        name, old = prefix + key, before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            changes += recipe_changes(old, value, f"{name}.")
        elif value != old and name not in FREE_FIELDS and not name.endswith("_every"):
            changes.append(f"{name} {old} -> {value}")
    return changes


class LogFile:
    """log.jsonl: one JSON object a line.

    Lines of a killed run from beyond the checkpoint at `step` are dropped, as is a half-written one.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break
        path.write_text("".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class StopRequest:
    """Ctrl-C, SIGTERM and a time limit end a run after the step at hand; a second Ctrl-C ends it at once.

    Use as a context; `reason` is "SIGINT", "SIGTERM", "max_minutes" or None.
    """

    REASONS = ("max_minutes", "SIGINT", "SIGTERM")

    def __init__(self, max_minutes: float | None):
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal: str | None = None
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def check(self, accelerator: Accelerator) -> None:
        """Set `reason` if this or another process wants to stop; all processes agree."""
        reason = self.signal or ("max_minutes" if time.monotonic() >= self.deadline else None)
        if accelerator.num_processes > 1:
            code = torch.tensor(
                0 if reason is None else 1 + self.REASONS.index(reason), device=accelerator.device
            )
            torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
            reason = None if code == 0 else self.REASONS[int(code) - 1]
        self.reason = reason
