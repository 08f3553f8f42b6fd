"""What a generator's training does beside learning: averages, checkpoints, sample sheets, reports."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainerCallback

from tokenflow.files import atomic_write
from tokenflow.training import checkpointing
from tokenflow.training.averaging import WeightAverage, whole
from tokenflow.training.progress import LogFile, recipe_changes
from tokenflow.training.samples import picture_grid, write_picture

if TYPE_CHECKING:
    from tokenflow.training.text_to_image import GenerationTrainer

logger = logging.getLogger(__name__)

SAMPLES, COLUMNS = 8, 4  # pictures of a sheet, and in one of its rows
_SHOWN = {"loss": "loss", "images_per_second": "img/s", "eval_bits_per_token": "bits"}  # beside the bar


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder` that was written to its end."""
    complete = [file.parent for file in (folder / "checkpoints").glob("checkpoint-*/complete.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


class Averaging(TrainerCallback):
    """The moving average of the weights: kept up to date, and taken up again by a resumed run."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.average = WeightAverage(trainer.network, trainer.recipe.optimizer.ema_decay)
        trainer.generator.image_tokenizer.model.to(args.device)
        last = latest_checkpoint(Path(trainer.recipe.output_dir))
        if last is not None and trainer.average.averages:
            updates = checkpointing.load_json(last / "complete.json")["average_updates"]
            trainer.average.load(load_file(last / "averages.safetensors"), updates)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.average.update()


class Stopping(TrainerCallback):
    """Ctrl-C, SIGTERM and the time limit end the run after the step at hand, with a checkpoint."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.stop.check(self.trainer.accelerator)
        if self.trainer.stop.reason is not None:
            control.should_training_stop = control.should_save = True
        return control


class Checkpoints(TrainerCallback):
    """Completes the Trainer's checkpoint with averages and export; the last file says that it is whole."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        trainer = self.trainer
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        averages = {name: whole(t).cpu() for name, t in trainer.average.averages.items()}
        with trainer.average.applied():  # until all is written: a state dict may hold the model's own tensors
            weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if args.should_save:
                checkpointing.save_tensors(averages, folder / "averages.safetensors")
                trainer.generator.save(folder / "export", weights)
        if not args.should_save:
            return
        with atomic_write(folder / "complete.json") as temporary:
            checkpointing.save_json({"average_updates": trainer.average.updates}, temporary)
        checkpointing.point_to(Path(trainer.recipe.output_dir) / "export", folder / "export")


class Samples(TrainerCallback):
    """Sheets of pictures by the averaged weights, always of the same prompts and seeds."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer, recipe = self.trainer, self.trainer.recipe
        if state.global_step % recipe.sample_every and state.global_step < state.max_steps:
            return
        prompts = list(recipe.sample_prompts) or (trainer.eval_rows or trainer.rows).captions(SAMPLES)
        prompts = prompts[:SAMPLES] or [""]
        trainer.network.eval()
        with trainer.average.applied(), trainer.compute_loss_context_manager():
            pictures = trainer.generator.pictures(prompts, recipe.sample_guidance)
        trainer.network.train()
        if args.should_save:
            folder = Path(recipe.output_dir) / "samples"
            rows = pictures.split(COLUMNS if len(pictures) % COLUMNS == 0 else len(pictures))
            write_picture(picture_grid(rows), folder / f"step-{state.global_step:08d}.png")
            with atomic_write(folder / "prompts.txt") as temporary:
                temporary.write_text("\n".join(prompts) + "\n", encoding="utf-8")


class Reports(TrainerCallback):
    """log.jsonl, and one progress bar."""

    def __init__(self, trainer: GenerationTrainer):
        self.recipe = trainer.recipe
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(self.recipe.output_dir)
        before = folder / "recipe.json"
        if state.global_step and before.exists():
            changes = recipe_changes(checkpointing.load_json(before), asdict(self.recipe))
            if changes:
                logger.warning("%s goes on with another recipe: %s", folder, ", ".join(changes))
        checkpointing.save_json(asdict(self.recipe), before)
        self.log_file = LogFile(folder / "log.jsonl", state.global_step)
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
            images = (state.global_step - step) * self.recipe.data.batch_size
            record["images_per_second"] = images / max(now - then, 1e-9)
            self.since = (now, state.global_step)
        self.log_file.write({"step": state.global_step, **record})
        self.shown |= {_SHOWN[name]: f"{value:.3g}" for name, value in record.items() if name in _SHOWN}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
