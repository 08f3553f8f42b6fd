"""What every run of transformers' Trainer does beside learning: stops on request, checkpoints, reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback

from tokenflow.data.loader import leave_signals_to_the_parent
from tokenflow.files import atomic_write
from tokenflow.training import checkpointing
from tokenflow.training.progress import LogFile, recipe_changes

logger = logging.getLogger(__name__)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder` that was written to its end."""
    complete = [file.parent for file in (folder / "checkpoints").glob("checkpoint-*/complete.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def signals_left_to_the_parent(batches: DataLoader) -> DataLoader:
    """The Trainer's loader, with workers that outlive the Ctrl-C or SIGTERM at which `Stopping` stops."""
    loader: Any = getattr(batches, "base_dataloader", batches)  # accelerate's is a wrapper
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return batches


def _start_worker(seed_worker: Callable[[int], None], worker: int) -> None:
    leave_signals_to_the_parent(worker)
    seed_worker(worker)


class Stopping(TrainerCallback):
    """Ctrl-C, SIGTERM and the time limit end the run after the step at hand, with a checkpoint.

    Args:
        trainer: has `stop`, a StopRequest.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.stop.check(self.trainer.accelerator)
        if self.trainer.stop.reason is not None:
            control.should_training_stop = control.should_save = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True  # however few steps there were since the last line
        return control


class Checkpoints(TrainerCallback):
    """Completes the Trainer's checkpoint with an export; the last file says that it is whole.

    Args:
        trainer: its `complete_checkpoint(folder)`, called by every process, writes `folder / "export"` where
            `args.should_save`, and returns what complete.json is to hold.
        folder: of the run; its `export` points to that of the newest checkpoint.
    """

    def __init__(self, trainer: Any, folder: str | Path):
        self.trainer, self.folder = trainer, Path(folder)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        about = self.trainer.complete_checkpoint(folder)
        if args.should_save:
            with atomic_write(folder / "complete.json") as temporary:
                checkpointing.save_json(about, temporary)
            checkpointing.point_to(self.folder / "export", folder / "export")


class Reports(TrainerCallback):
    """log.jsonl, and one progress bar.

    Args:
        recipe: a dataclass; recipe.json keeps it, and a run that goes on with another one is warned of.
        folder: of the run.
        batch_size: what one step learns from, over all processes.
        rate: what to call the speed, such as "images_per_second".
        shown: names of what the bar shows of a log line, by what it calls them.
    """

    def __init__(self, recipe: Any, folder: str | Path, batch_size: int, rate: str, shown: dict[str, str]):
        self.recipe, self.folder, self.batch_size = recipe, Path(folder), batch_size
        self.rate, self.names = rate, shown
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        before = self.folder / "recipe.json"
        if state.global_step and before.exists():
            changes = recipe_changes(checkpointing.load_json(before), asdict(self.recipe))
            if changes:
                logger.warning("%s goes on with another recipe: %s", self.folder, ", ".join(changes))
        checkpointing.save_json(asdict(self.recipe), before)
        self.log_file = LogFile(self.folder / "log.jsonl", state.global_step)
        self.since = (time.monotonic(), state.global_step)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", mininterval=1.0, dynamic_ncols=True
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        record: dict[str, Any] = {name: value for name, value in (logs or {}).items() if name != "epoch"}
        if "train_runtime" in record:  # the Trainer's closing words
            return
        if "loss" in record:
            now, (then, step) = time.monotonic(), self.since
            record[self.rate] = (state.global_step - step) * self.batch_size / max(now - then, 1e-9)
            self.since = (now, state.global_step)
        self.log_file.write({"step": state.global_step, **record})
        self.shown |= {self.names[name]: f"{record[name]:.3g}" for name in record if name in self.names}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
